"""The wheel for every Python and old systems, made of next to nothing; `make wheel` tries a whole one."""

import ctypes
import hashlib
import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEWEST = {
    "GLIBC": (2, 28),
    "GLIBCXX": (3, 4, 24),
    "CXXABI": (1, 3, 11),
    "GCC": (7, 0, 0),
}  # of manylinux_2_28

pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="this is no checkout"),
    pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="ziglang is not installed"),
    pytest.mark.skipif(shutil.which("readelf") is None, reason="binutils are missing"),
]


def sources(folder: Path) -> Path:
    """A copy of all that makes a wheel, but for kernels and ops."""
    ignore = shutil.ignore_patterns(
        ".*", "build", "dist", "benchmarks", "tests", "*.so", "*.egg-info", "__pycache__"
    )
    shutil.copytree(ROOT, folder, ignore=ignore)
    csrc = folder / "csrc"
    for path in [*csrc.glob("*.cpp"), *(csrc / "cpu").rglob("*.cpp")]:
        if path.stem not in ("isa", "exports"):
            path.unlink()
    return folder


def built(folder: Path, compiler: str, umask: int) -> Path:
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("FASTSPARSE_") and name != "PYTHONPATH"  # another copy of all this
    }
    environment = {"FASTSPARSE_WHEEL": "1", "FASTSPARSE_CUDA": "0", "FASTSPARSE_CPU": "1", "CXX": compiler}
    environment["ZIG_GLOBAL_CACHE_DIR"] = str(ROOT / "build" / "zig")  # what it makes of glibc takes a while
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "bdist_wheel"],
        env=clean | environment,
        cwd=folder,
        umask=umask,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (folder / "dist").iterdir()
    return wheel


@pytest.fixture(scope="module", params=["g++", "aarch64-linux-gnu-g++"])
def wheels(request, tmp_path_factory) -> tuple[str, list[Path]]:
    """For which machine, and wheels of equal sources that were made elsewhere, by others, after others."""
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    asked = [request.param, "-dumpmachine"]
    machine = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split("-")[0]
    folder = tmp_path_factory.mktemp("wheels")
    first = built(sources(folder / "first"), request.param, umask=0o022)
    other = sources(folder / "elsewhere" / "other")
    left = (
        other
        / "build"
        / f"wheel-{machine}"
        / f"lib.linux-x86_64-cpython-{sys.version_info[0]}{sys.version_info[1]}"
    )
    (left / "fastsparse").mkdir(parents=True)
    (left / "fastsparse" / "_host.so").touch()
    for path in other.rglob("*.py"):
        path.chmod(0o664)
        os.utime(path, (1_700_000_000, 1_700_000_000))
    return machine, [first, built(other, request.param, umask=0o002)]


def test_equal_sources_make_equal_bytes(wheels):
    _, (first, other) = wheels
    with zipfile.ZipFile(first) as one, zipfile.ZipFile(other) as two:
        assert one.namelist() == two.namelist()
        for name in one.namelist():
            assert one.read(name) == two.read(name), name
    assert first.read_bytes() == other.read_bytes()


def test_one_wheel_is_for_every_python(wheels):
    machine, (wheel, _) = wheels
    assert re.fullmatch(rf"fastsparse_torch-[\d.]+-py3-none-manylinux_2_28_{machine}\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as files:
        libraries = {name for name in files.namelist() if name.endswith(".so")}
        assert libraries == {"fastsparse/_ops_cpu.so"}
        about = next(name for name in files.namelist() if name.endswith(".dist-info/WHEEL"))
        assert f"Tag: py3-none-manylinux_2_28_{machine}\n" in files.read(about).decode()
        assert {"fastsparse/kernels/spmm.py", "fastsparse/reference/spmm.py"} <= set(files.namelist())
        for file in files.infolist():
            mode = 0o755 if file.filename in libraries else 0o644
            assert stat.S_IMODE(file.external_attr >> 16) == mode or file.filename.endswith("/RECORD")


@pytest.fixture
def library(wheels, tmp_path) -> Path:
    with zipfile.ZipFile(wheels[1][0]) as files:
        return Path(files.extract("fastsparse/_ops_cpu.so", tmp_path))


def shown(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_library_needs_no_newer_system(wheels, library):
    """auditwheel's policy for manylinux_2_28, which `make wheel` asks auditwheel for too."""
    wanted = re.findall(r"Name: ([A-Z]+)_([\d.]+)", shown("readelf", "--version-info", library))
    assert "GLIBC" in dict(wanted)
    assert not [
        (name, version) for name, version in wanted if tuple(map(int, version.split("."))) > NEWEST[name]
    ]
    needed = re.findall(r"NEEDED.*\[(lib[a-z_+]+)", shown("readelf", "--dynamic", library))
    assert "libstdc++" in needed  # the system's, none of its own
    assert set(needed) <= {
        "libc",
        "libdl",
        "libgcc_s",
        "libm",
        "libpthread",
        "librt",
        "libstdc++",
        "libtorch_cpu",
    }


def test_the_library_offers_its_own_names_alone(library):
    names = [line.split()[-1] for line in shown("nm", "-D", "--defined-only", library).splitlines()]
    assert "fastsparse_cpu_facts" in names
    assert not [name for name in names if not name.startswith("fastsparse_")]


def test_the_library_finds_the_processor(wheels, library):
    """zig has a description of the processor of its own, an empty one: baseline code would run everywhere."""
    machine, _ = wheels
    if machine != os.uname().machine:
        pytest.skip(f"for {machine}")
    import fastsparse.backend

    if fastsparse.backend._cpu.failure is not None:
        pytest.skip(fastsparse.backend._cpu.failure)
    facts = ctypes.CDLL(str(library)).fastsparse_cpu_facts
    facts.restype = ctypes.c_char_p
    assert json.loads(facts()) == fastsparse.backend._cpu.facts("cpu")


def test_the_bill_of_materials(wheels):
    machine, (wheel, _) = wheels
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if "/sboms/" in name)
        assert name.endswith(".dist-info/sboms/fastsparse.cdx.json")
        bill = json.loads(files.read(name))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    subject = bill["metadata"]["component"]
    assert subject["purl"].startswith("pkg:pypi/fastsparse-torch@")
    facts = {fact["name"].removeprefix("fastsparse:"): fact["value"] for fact in subject["properties"]}
    digest = facts.pop("source-sha256")
    levels = "baseline avx2 avx512" if machine == "x86_64" else "baseline"
    assert facts == {"machine": machine, "glibc": "2.28", "parts": "_ops_cpu", "levels": levels}
    assert re.fullmatch("[0-9a-f]{64}", digest)
    tools = {tool["name"]: tool["version"] for tool in bill["components"]}
    assert {"setuptools", "torch", "ziglang"} < tools.keys()
    assert any("g++" in name for name in tools)


def test_the_digest_is_that_of_the_sources(tmp_path):
    """A byte anywhere, and it is another."""
    folder = sources(tmp_path / "sources")

    def digest() -> str:
        return shown(
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(folder)!r}); import setup; print(setup.source_digest())",
        )

    before = digest()
    assert digest() == before
    assert hashlib.sha256().hexdigest() != before.strip()
    changed = folder / "csrc" / "cpu" / "isa.h"
    changed.write_text(changed.read_text() + "\n")
    assert digest() != before
