"""What the compiled libraries are made of, and what setup.py makes of its environment."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastsparse

ROOT = Path(__file__).parents[1]
OBJECTS = sorted((ROOT / "build").glob("temp*/fastsparse._ops_cpu/*.*.o"))
CUDA_LIBRARY = Path(fastsparse.__file__).parent / "_ops_cuda.so"

cuda_built = pytest.mark.skipif(
    not CUDA_LIBRARY.exists(), reason="the CUDA kernels were not built (FASTSPARSE_CUDA=1)"
)
checkout = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="this is no checkout")


def shown_by(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not OBJECTS, reason="the kernels were not built in this checkout")
def test_no_level_offers_its_code_to_another():
    """Of two weak definitions the linker keeps either: AVX-512 code could end up in every level's path."""
    levels = set()
    for path in OBJECTS:
        level = path.suffixes[-2][1:]
        levels.add(level)
        for line in shown_by("nm", "--demangle", "--defined-only", path).splitlines():
            _, kind, symbol = line.split(maxsplit=2)
            shared_code = kind in "WwuTi"
            assert not shared_code or f"fastsparse::{level}::" in symbol, f"{path.name} defines {symbol}"
    assert "baseline" in levels


@cuda_built
def test_the_cuda_library_loads_under_every_pytorch():
    """Without PyTorch's CUDA too, where nothing of it runs: the stable ABI is all that it links to."""
    code = (
        "import fastsparse, torch\n"
        "from fastsparse.backend import _cuda\n"
        "failure = _cuda.failure\n"
        "if torch.version.cuda is None:\n"
        "    assert failure.startswith('libtorch_cuda.so is not loaded'), failure\n"
        "from fastsparse.ops._library import OPS\n"
        "for op in [name for name, record in OPS.items() if 'cuda' in record.kernels]:\n"
        "    assert torch._C._dispatch_has_kernel_for_dispatch_key(f'fastsparse_cuda::{op}', 'CUDA'), op\n"
        "print(_cuda.contents)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    contents = done.stdout.split()
    machine = [code for code in contents if re.fullmatch(r"sm_\d+", code)]
    between = ["compute_90"] if "sm_90" in machine[:-1] else []
    assert contents == [*machine, *between, f"compute_{machine[-1][3:]}"]


@cuda_built
@pytest.mark.skipif(shutil.which("readelf") is None, reason="binutils are missing")
def test_the_cuda_library_needs_and_offers_no_cuda():
    """It brings CUDA's runtime and keeps it to itself: PyTorch's own, perhaps older, has the same names."""
    libraries = re.findall(r"NEEDED.*\[(.+)\]", shown_by("readelf", "-d", CUDA_LIBRARY))
    assert "libtorch_cpu.so" in libraries
    assert not [name for name in libraries if re.search("cuda|cublas|c10|python", name)]
    names = [line.split()[-1] for line in shown_by("nm", "-D", "--defined-only", CUDA_LIBRARY).splitlines()]
    assert {"fastsparse_cuda_failure", "fastsparse_cuda_contents"} <= set(names)
    assert not [name for name in names if re.match("cu[A-Zd]|__cuda", name)]


def python(*arguments: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FASTSPARSE_")}
    return subprocess.run(
        [sys.executable, *arguments],
        env=clean | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


def setup(call: str, **environment: str) -> subprocess.CompletedProcess:
    """What a function of setup.py prints in an environment."""
    return python("-c", f"import setup; print(setup.{call})", **environment)


@pytest.fixture
def toolkit(tmp_path):
    """A folder like CUDA's, whose nvcc is 12.6 and compiles nothing."""
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo "Cuda compilation tools, release 12.6, V12.6.85"; fi\n'
        'if [ "$1" = --list-gpu-arch ]; then printf "compute_%s\\n" 75 80 86 90 121; fi\n'
    )
    nvcc.chmod(0o755)
    return str(tmp_path)


@checkout
def test_archs_are_those_that_nvcc_knows(toolkit):
    done = setup("cuda_contents()", CUDA_HOME=toolkit)
    assert done.stdout.splitlines()[-1] == "sm_80 sm_90 compute_90"
    assert "fastsparse: nvcc 12.6 can't compile for sm_100, sm_120, which are left out" in done.stderr
    done = setup("cuda_contents()", CUDA_HOME=toolkit, FASTSPARSE_CUDA_ARCHS="80 90 121")
    assert done.stdout.splitlines()[-1] == "sm_80 sm_90 sm_121 compute_90 compute_121"
    done = setup("cuda_contents()", CUDA_HOME=toolkit, FASTSPARSE_CUDA_ARCHS="86;80, 86")
    assert done.stdout.splitlines()[-1] == "sm_80 sm_86 compute_86"


@checkout
@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, "['_ops_cpu', '_host', '_ops_cuda']"),
        ({"FASTSPARSE_CUDA": "1"}, "['_ops_cpu', '_host', '_ops_cuda']"),
        ({"FASTSPARSE_CUDA": "0"}, "['_ops_cpu', '_host']"),
        ({"FASTSPARSE_WHEEL": "1"}, "['_ops_cpu', '_ops_cuda']"),
        ({"FASTSPARSE_CPU": "0"}, "[]"),
        ({"FASTSPARSE_CPU": "0", "FASTSPARSE_CUDA": "1"}, "['_ops_cuda']"),
    ],
)
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_what_is_built(toolkit, environment, wanted):
    done = setup("wanted()", CUDA_HOME=toolkit, CXX="g++", **environment)
    assert done.stdout.splitlines()[-1] == wanted


@checkout
@pytest.mark.parametrize(
    ("said", "levels"),
    [
        ("x86_64-linux-gnu", "['baseline', 'avx2', 'avx512']"),
        ("x86_64-redhat-linux", "['baseline', 'avx2', 'avx512']"),
        ("aarch64-linux-gnu", "['baseline']"),
    ],
)
def test_levels_are_those_of_the_machine_that_is_compiled_for(tmp_path, said, levels):
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nif [ "$1" = -dumpmachine ]; then echo {said}; fi\n')
    compiler.chmod(0o755)
    done = setup("machine(), [*setup.levels()]", CXX=str(compiler))
    assert done.stdout.splitlines()[-1] == f"{said.split('-')[0]} {levels}", done.stderr


ARCHS = "FASTSPARSE_CUDA_ARCHS: must be a list of what nvcc 12.6 can compile for (75, 80, 86, 90, 121), got"
NO_NVCC, NO_COMPILER = "no nvcc was found (set CUDA_HOME)", "no C++ compiler was found (set CXX)"


@checkout
@pytest.mark.parametrize(
    ("call", "environment", "message"),
    [
        *(
            ("cuda_contents()", {"FASTSPARSE_CUDA_ARCHS": bad}, f"{ARCHS} {bad!r}")
            for bad in ("100", "90a", "sm_90", "80+PTX", ",")
        ),
        ("wanted()", {"FASTSPARSE_CUDA": "1", "CUDA_HOME": "/none"}, f"FASTSPARSE_CUDA=1: {NO_NVCC}"),
        ("wanted()", {"FASTSPARSE_CUDA": "1", "CXX": "none"}, f"FASTSPARSE_CUDA=1: {NO_COMPILER}"),
        ("wanted()", {"FASTSPARSE_CPU": "1", "CXX": "none"}, f"FASTSPARSE_CPU=1: {NO_COMPILER}"),
        ("wanted()", {"FASTSPARSE_CUDA": "yes"}, "FASTSPARSE_CUDA: must be 0 or 1, got 'yes'"),
        ("wanted()", {"FASTSPARSE_CPU": "2"}, "FASTSPARSE_CPU: must be 0 or 1, got '2'"),
        ("wanted()", {"FASTSPARSE_WHEEL": "all"}, "FASTSPARSE_WHEEL: must be 0 or 1, got 'all'"),
    ],
)
def test_what_can_not_be_built_is_an_error(toolkit, call, environment, message):
    done = setup(call, **({"CUDA_HOME": toolkit} | environment))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == message


@checkout
def test_without_nvcc_it_is_said():
    done = setup("cuda_wanted()", CUDA_HOME="/none")
    assert done.stdout.splitlines()[-1] == "False"
    assert f"fastsparse: {NO_NVCC}; installing without CUDA kernels" in done.stderr


@pytest.fixture
def sources(tmp_path) -> Path:
    """A copy of what is built, without anything that was."""
    ignore = shutil.ignore_patterns(".*", "build", "dist", "benchmarks", "tests", "*.so", "*.egg-info")
    return shutil.copytree(ROOT, tmp_path / "sources", ignore=ignore)


@checkout
@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({"CXX": "none"}, []),
        ({"CXX": "true"}, ["pybind11>=2.13", "torch>=2.10"]),
        ({"CXX": "true", "FASTSPARSE_CPU": "0", "FASTSPARSE_CUDA": "1"}, ["torch>=2.10"]),
        ({"CXX": "true", "FASTSPARSE_WHEEL": "1"}, ["torch>=2.10", "ziglang>=0.14"]),
        ({"CXX": "none", "FASTSPARSE_WHEEL": "1"}, []),
    ],
)
def test_a_build_asks_for_what_it_compiles_with(toolkit, sources, environment, asked):
    """What pip would download for an environment of the build's own."""
    project = (sources / "pyproject.toml").read_text()
    assert 'requires = ["setuptools>=77"]\nbuild-backend = "setup"' in project
    code = (
        "import json, setup\n"
        "kinds = ('wheel', 'editable', 'sdist')\n"
        "print(json.dumps([getattr(setup, f'get_requires_for_build_{kind}')() for kind in kinds]))"
    )
    done = python("-c", code, cwd=sources, CUDA_HOME=toolkit, **environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [asked, asked, []]


@checkout
@pytest.mark.parametrize(
    ("content", "said"),
    [("raise ImportError('gone')", r" \(gone\)"), ("__version__ = '2.9.1'", ", got 2.9.1")],
)
def test_what_a_build_needs_is_missed_before_work_begins(tmp_path, sources, content, said):
    (tmp_path / "pybind11.py").write_text(content)
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/compiled\n")
    compiler.chmod(0o755)
    environment = {"CXX": str(compiler), "FASTSPARSE_CUDA": "0", "PYTHONPATH": str(tmp_path)}
    done = python("setup.py", "--quiet", "build", cwd=sources, **environment)
    assert done.returncode == 1
    message = f"fastsparse: compiling needs pybind11>=2.13{said}: pip install 'pybind11>=2.13'"
    assert re.match(message, done.stderr.splitlines()[-1]), done.stderr
    assert not (tmp_path / "compiled").exists()


@checkout
def test_the_source_distribution_holds_what_its_tests_need(tmp_path):
    done = python("setup.py", "--quiet", "egg_info", "--egg-base", tmp_path, CXX="none")
    assert done.returncode == 0, done.stderr
    shipped = set((tmp_path / "fastsparse_torch.egg-info" / "SOURCES.txt").read_text().splitlines())
    assert "setup.py" in shipped
    for folder in ("benchmarks", "csrc", "docs", "fastsparse", "hub", "kernels", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix not in (".so", ".pyc"):
                assert str(path.relative_to(ROOT)) in shipped


@checkout
@pytest.mark.skipif(shutil.which("make") is None, reason="make is missing")
@pytest.mark.parametrize(
    ("asked", "gpu", "library", "wanted"),
    [
        ({}, False, False, "0"),
        ({}, True, False, "auto"),
        ({}, False, True, "auto"),
        ({"FASTSPARSE_CUDA": "1"}, False, False, "1"),
        ({"FASTSPARSE_CUDA": "0"}, True, True, "0"),
    ],
)
def test_verbs_that_run_build_cuda_where_a_gpu_is_or_where_asked(sources, asked, gpu, library, wanted):
    device = sources / "nvidia0"
    if gpu:
        device.touch()
    if library:
        (sources / "fastsparse" / "_ops_cuda.so").touch()
    ours = re.compile("FASTSPARSE_|MAKE|MFLAGS")
    clean = {name: value for name, value in os.environ.items() if not ours.match(name)}
    command = ["make", "--dry-run", "--no-print-directory", "kernels", f"GPU_DEVICES={device}"]
    done = subprocess.run(command, cwd=sources, env=clean | asked, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"FASTSPARSE_CUDA={wanted} .venv/bin/python setup.py --quiet build_ext --inplace" in done.stdout
