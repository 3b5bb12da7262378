"""What the compiled library is made of."""

import subprocess
from pathlib import Path

import pytest

OBJECTS = sorted((Path(__file__).parents[1] / "build").glob("temp*/fastsparse._ops_cpu/*.*.o"))


@pytest.mark.skipif(not OBJECTS, reason="the kernels were not built in this checkout")
def test_no_level_offers_its_code_to_another():
    """Of two weak definitions the linker keeps either: AVX-512 code could end up in every level's path."""
    levels = set()
    for path in OBJECTS:
        level = path.suffixes[-2][1:]
        levels.add(level)
        listing = subprocess.run(
            ["nm", "--demangle", "--defined-only", path], capture_output=True, text=True, check=True
        )
        for line in listing.stdout.splitlines():
            _, kind, symbol = line.split(maxsplit=2)
            shared_code = kind in "WwuTi"
            assert not shared_code or f"fastsparse::{level}::" in symbol, f"{path.name} defines {symbol}"
    assert "baseline" in levels
