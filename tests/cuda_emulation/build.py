"""Builds the CUDA kernels for the CPU, over the emulator, with the host's C++ compiler.

Variants:

- ``plain``: fast;
- ``racecheck``: every load and store of device code is checked for races, for reads of shared memory that
  nobody wrote, and for the bounds of shared memory;
- ``address``: AddressSanitizer and UndefinedBehaviorSanitizer, for the bounds of all memory. The process must
  have been started with their runtime: see :func:`preload`.

    python tests/cuda_emulation/build.py [variant]        builds the ops and prints where they are
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda_emulation"
MACHINE = [HERE / "emulator.cpp", HERE / "fiber.cpp"]

# No contraction: the sources say where a multiplication and an addition are fused.
FLAGS = [
    *("-x", "c++", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter"),
    *("-DFASTSPARSE_EMULATED", f"-I{CSRC}", f"-I{HERE}"),
]
VARIANTS = {
    "plain": ["-O2", "-g1"],
    # racecheck.cpp, not ThreadSanitizer, answers the calls that the compiler leaves at every access.
    "racecheck": ["-O1", "-g1", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"],
    "address": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
}


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")


def unavailable() -> str | None:
    """Why nothing can be built here, if so."""
    return None if compiler() else "the CUDA emulator needs a C++ compiler (set CXX), and none was found"


def library(variant: str = "plain") -> Path:
    """The shared library of every op in csrc/cuda, built if it isn't up to date.

    Loading it registers the ops for CPU tensors in the namespace ``fastsparse_cuda``, whose schemas
    ``fastsparse.ops`` defines.
    """
    import torch

    package = Path(torch.__file__).parent
    flags = [f"-I{package / 'include'}", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    libraries = [f"-L{package / 'lib'}", "-ltorch", "-ltorch_cpu"]
    sources = [*sorted((CSRC / "cuda").glob("*.cu")), *sorted(CSRC.glob("*.cpp"))]
    return build("fastsparse_cuda", sources, variant, flags, libraries)


@functools.cache
def load() -> ctypes.CDLL:
    """The ops of :func:`library`, loaded once, in the variant that FASTSPARSE_EMULATOR names."""
    variant = os.environ.get("FASTSPARSE_EMULATOR", "racecheck")
    if variant not in VARIANTS:
        raise ValueError(f"FASTSPARSE_EMULATOR: must be one of {', '.join(VARIANTS)}, got {variant!r}")
    from fastsparse.backend import load_kernels

    return load_kernels(library(variant))


def build(
    name: str, sources: list[Path], variant: str, flags: Iterable[str] = (), libraries: Iterable[str] = ()
) -> Path:
    """A shared library of some sources and the emulator, in one variant."""
    if (reason := unavailable()) is not None:
        raise RuntimeError(reason)
    folder = BUILD / variant / name
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}.so"
    machine_flags = _machine_flags(variant)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may want the same
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            emulated = pool.map(lambda path: _compile(path, folder, [*VARIANTS[variant], *flags]), sources)
            machine = pool.map(lambda path: _compile(path, folder, machine_flags), _machine(variant))
            objects = sorted({*emulated, *machine})
        newest = max(path.stat().st_mtime_ns for path in objects)
        if not target.exists() or target.stat().st_mtime_ns < newest:
            sanitizers = VARIANTS["address"] if variant == "address" else []
            made = target.with_suffix(".new")
            _run(
                [compiler(), "-shared", *sanitizers, *map(str, objects), "-o", str(made), *libraries, "-ldl"]
            )
            made.replace(target)  # whoever has the old one loaded keeps it
    return target


def _machine(variant: str) -> list[Path]:
    return [*MACHINE, HERE / "racecheck.cpp"] if variant == "racecheck" else MACHINE


def _machine_flags(variant: str) -> list[str]:
    if variant == "racecheck":
        return ["-O2", "-g1", "-DFASTSPARSE_RACECHECK"]
    return VARIANTS[variant]


def _compile(source: Path, folder: Path, flags: list[str]) -> Path:
    """The source's object, compiled unless one from the same flags and contents is there."""
    target, stamp = folder / f"{source.stem}.o", folder / f"{source.stem}.stamp"
    dependencies = folder / f"{source.stem}.d"
    command = [compiler(), *FLAGS, *flags, "-c", str(source)]

    def contents() -> str:
        paths = dependencies.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        state = hashlib.sha256("\0".join(command).encode())
        for path in paths:
            state.update(Path(path).read_bytes())
        return state.hexdigest()

    try:
        fresh = target.exists() and stamp.read_text() == contents()
    except FileNotFoundError:
        fresh = False
    if not fresh:
        stamp.unlink(missing_ok=True)
        _run([*command, "-MD", "-MF", str(dependencies), "-o", str(target)])
        stamp.write_text(contents())
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")


def preload() -> dict[str, str]:
    """Environment variables of a process that is to load the ``address`` variant."""

    def path(name: str) -> str:
        ask = [compiler(), f"-print-file-name={name}"]
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()

    # libstdc++ too: it must be there when the sanitizer looks for what it has to intercept.
    libraries = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    return {"LD_PRELOAD": " ".join(map(path, libraries)), "ASAN_OPTIONS": "detect_leaks=0"}


if __name__ == "__main__":
    print(library(*sys.argv[1:]))
