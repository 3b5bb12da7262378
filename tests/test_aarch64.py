"""The CPU kernels on Arm: cross-compiled, run under user-mode emulation, held against plain loops."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CPU = ROOT / "csrc" / "cpu"
DRIVER = ROOT / "tests" / "aarch64" / "kernels.cpp"

# Armv8.0, Armv8.2, and all that the emulator knows: whether they multiply matrices of bf16.
PROCESSORS = {"cortex-a53": "no", "neoverse-n1": "no", "max": "yes"}

# -O3 for all would take twice as long: what has code of its own for Arm gets it.
THOROUGHLY = {"bf16_panels", "integers", "integers_product", "rows", "screen"}


def tool(name: str, package: str) -> str:
    """Where a program is, or a skip with the reason; in CI that is an error."""
    if (found := shutil.which(name)) is None:
        reason = f"{name} is missing: on Debian, apt install {package}"
        assert os.environ.get("CI") != "true", reason
        pytest.skip(reason)
    return found


def output(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def built(compiler: str, folder: Path) -> Path:
    """A program of every kernel and what it is held against, made again when anything of it has changed."""
    flags = json.loads(output(sys.executable, "-c", "import json, setup; print(json.dumps(setup.flags()))"))

    def command(source: Path) -> list[str]:
        level = [] if source.stem == "isa" else ["-DFASTSPARSE_ISA=baseline"]
        speed = [] if source.stem in THOROUGHLY else ["-O1"]
        return [compiler, *flags, "-Werror", f"-I{ROOT / 'csrc'}", *level, *speed, "-c", str(source)]

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        assert output(*command(source), "-o", target) == ""
        return target

    sources = [*sorted(CPU.glob("*.cpp")), DRIVER]
    state = hashlib.sha256(output(compiler, "--version").encode())
    for path in [*sources, *sorted(ROOT.glob("csrc/*.h")), *sorted(CPU.glob("*.h"))]:
        state.update(f"{path.name} {command(path)}".encode() + path.read_bytes())
    program = ROOT / "build" / "aarch64" / state.hexdigest()[:16]
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compiled, sources))
        output(compiler, "-static", *objects, "-o", program.with_suffix(".new"))
        program.with_suffix(".new").replace(program)
    return program


# All processors in one test, which one process runs: it would be built by several else.
@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="this is no checkout")
def test_kernels(tmp_path):
    compiler = tool("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu")
    emulator = tool("qemu-aarch64", "qemu-user")
    program = built(compiler, tmp_path)
    for processor, bf16 in PROCESSORS.items():
        said = output(emulator, "-cpu", processor, program).splitlines()
        assert said[0] == f"bf16 products: {bf16}"
        assert said[-1] == "0 failures"
        families = {line.split(":")[0] for line in said[1:-1]}
        assert {"halves", "integers", "screen", "sparse products", "gated recurrences"} <= families
        assert ("bf16 panels" in families) == (bf16 == "yes")
