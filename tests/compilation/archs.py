"""For which GPUs CI has to compile CUDA C++: for one, where these very sources have been compiled for all.

docs/archs.json says of which sources that is so, with which CUDA; ``--write`` notes it, when nothing is wrong
in a library that was built for all. Each GPU takes as long as all that is compiled for CPUs.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from .headers import hash_of, setup
from .tools import ROOT, cuda_library

RECORD = ROOT / "docs" / "archs.json"
ONE = "90"


def sources() -> list[Path]:
    """What device code is made of."""
    headers = setup.CSRC.glob("*.h")
    return sorted([*headers, *(path for path in (setup.CSRC / "cuda").iterdir() if path.is_file())])


def key() -> str:
    """A hash of the sources, of how they are compiled, and for what."""
    return hash_of(sources(), str(setup.CUDA_ARCHS))


def record() -> dict[str, str]:
    """By version of CUDA, the key of the sources that were compiled with it for every GPU."""
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def wanted() -> str:
    """What FASTSPARSE_CUDA_ARCHS is to be in CI; empty: every GPU."""
    return ONE if setup.nvcc() and record().get(setup.cuda_toolkit()) == key() else ""


def note(records: Iterable[dict]) -> None:
    """Keep the key of the sources, if the library was made of them, and for every GPU."""
    library, _ = cuda_library()
    newest = max(path.stat().st_mtime for path in sources())
    for_all = {f"sm_{arch}" for arch in setup.CUDA_ARCHS} == {record["target"] for record in records}
    if for_all and newest < library.stat().st_mtime:
        RECORD.write_text(json.dumps({setup.cuda_toolkit(): key()}) + "\n", encoding="utf-8")
