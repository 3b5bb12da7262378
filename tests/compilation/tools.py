"""Which Tritons and which CUDA library there are to look at, and what they say."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import fastsparse

from .usage import cuobjdump, of_cuda_binary

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "compilation"
RECORDS = BUILD / "records"
# The oldest that the kernels are for, and the newest of the day.
TRITON_VERSIONS = ("3.6.0", "3.9.0")


class MissingError(Exception):
    """A tool isn't here and can't be fetched."""


def triton(version: str) -> Path:
    """The folder that a version of Triton is imported from: the installed one's, else one in build/."""
    try:
        installed = importlib.metadata.distribution("triton")
    except importlib.metadata.PackageNotFoundError:
        installed = None
    if installed and installed.version == version:
        return Path(installed.locate_file(""))
    folder = BUILD / f"triton-{version}"
    if not folder.exists():
        draft = folder.with_suffix(f".{os.getpid()}")
        options = ["--quiet", "--no-input", "--no-deps", "--target", draft]
        command = [sys.executable, "-m", "pip", "install", *options, f"triton=={version}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(draft, ignore_errors=True)
            reason = done.stderr.strip().splitlines() or ["pip gave no reason"]
            raise MissingError(f"triton {version} could not be installed: {reason[-1]}")
        draft.rename(folder)
    return folder


def triton_records(
    version: str,
    *paths: Path,
    package: str = "fastsparse.kernels",
    calls: str = "tests.compilation.calls",
    known: Iterable[dict] = (),
    cache: Path = RECORDS,
) -> list[dict]:
    """What a package's kernels need under a version of Triton, as calls launch them; see triton_kernels.py.

    A record that is ``known`` is taken where its key says that a compilation would be the same again. Keys
    are the newest Triton's, so that no other one must be there if nothing is to be compiled.
    """

    def ask(version: str, vendor: str, *folder: Path, wanted: list[tuple[str, str]] = ()) -> list[dict]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
        places = [triton(version), *paths, os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(str(place) for place in places if str(place))
        command = [sys.executable, "-m", "tests.compilation.triton_kernels", package, calls, vendor, *folder]
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, input=json.dumps(wanted)
        )
        if done.returncode:
            raise RuntimeError(f"compiling under triton {version} failed:\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])

    kept = {(record["name"], record["target"], record["key"]): record for record in known}
    found = []
    for vendor in ("nvidia", "amd"):
        listed = ask(TRITON_VERSIONS[-1], vendor)
        stale = [job for job in listed if tuple(job.values()) not in kept]
        wanted = [(job["name"], job["target"]) for job in stale]
        new = ask(version, vendor, cache, wanted=wanted) if wanted else []
        keys = zip(stale, new, strict=True)  # its own, which another version may compute in another way
        compiled = {tuple(job.values()): record | {"key": job["key"]} for job, record in keys}
        found += [(kept | compiled)[tuple(job.values())] for job in listed]
    return found


def cuda_library() -> tuple[Path, Path]:
    """The built CUDA library, and cuobjdump."""
    library = Path(fastsparse.__file__).with_name("_ops_cuda.so")
    if not library.exists():
        raise MissingError(f"{library.name} was not built")
    tool = cuobjdump(
        *(folder / "triton" / "backends" / "nvidia" / "bin" for folder in BUILD.glob("triton-*"))
    )
    if tool is None:
        raise MissingError("cuobjdump was found neither beside nvcc nor in an installed triton")
    return library, tool


def cuda_records() -> list[dict]:
    """What the kernels of the built CUDA library need, CUB's left out."""
    library, tool = cuda_library()
    found = list(of_cuda_binary(library, tool))
    names = _demangled([name for _, name, _ in found])
    return [
        {"name": re.sub(r"fastsparse::(cuda::)?", "", name), "target": target, **vars(usage)}
        for name, (target, _, usage) in sorted(zip(names, found, strict=True), key=lambda pair: pair[0])
        if name.startswith("fastsparse::")
    ]


def _demangled(names: list[str]) -> list[str]:
    """C++ names without their return types and parameters."""
    tool = shutil.which("c++filt")
    if tool is None:
        raise MissingError("c++filt (of binutils) was not found")
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    plain = []
    for name in done.stdout.splitlines():
        name = re.sub(r"\(anonymous namespace\)::", "", name)
        plain.append(_until_parameters(name.removeprefix("void ")))
    return plain


def _until_parameters(name: str) -> str:
    """A demangled name up to the parenthesis that opens its parameters, the first one outside < >."""
    depth = 0
    for position, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return name[:position]
    return name
