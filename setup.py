"""Builds the compiled parts: ``_ops_cpu`` and ``_ops_cuda`` (PyTorch's stable ABI) and ``_host`` (pybind11).

It is also the build backend that pyproject.toml names: setuptools', which asks for PyTorch and pybind11 only
where something is compiled with them.

Environment:
    FASTSPARSE_CPU=1        a missing C++ compiler is an error (default: the install runs on the reference)
    FASTSPARSE_CPU=0        leave all compiled parts out, CUDA too unless FASTSPARSE_CUDA=1 asks for it
    FASTSPARSE_CUDA=1       a missing nvcc is an error (default: CUDA is built where nvcc is found)
    FASTSPARSE_CUDA=0       leave CUDA out
    FASTSPARSE_CUDA_ARCHS   which GPUs to build for, such as "80,90" (default: what nvcc knows of CUDA_ARCHS);
                            the newest also as PTX, which the driver compiles for GPUs that are newer still
    FASTSPARSE_SANITIZE=1   build with AddressSanitizer and UndefinedBehaviorSanitizer
    FASTSPARSE_WHEEL=1      make a wheel for every Python and every Linux from RHEL 8 on: without ``_host``,
                            linked by ziglang (default: a wheel for this Python and this system)
    CXX                     the compiler; with FASTSPARSE_WHEEL=1 it may be one for other machines
    CUDA_HOME               where CUDA is (default: where nvcc is on PATH, then /usr/local/cuda)
    MAX_JOBS                how many files are compiled at once (default: the number of CPUs)

Neither PyTorch's CUDA nor a GPU is needed to build for CUDA, and neither is looked at.
"""

import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from setuptools import Extension, build_meta, setup
from setuptools.build_meta import (  # noqa: F401 (the backend's other hooks)
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
# Hugging Face's `kernels` plugs into setuptools, where a folder of ours must not be taken for it.
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != ROOT.resolve()]
TORCH_TARGET = "0x020a000000000000"  # the oldest torch that the binary serves: 2.10

# Every kernel file is compiled once for each level; csrc/cpu/isa.cpp chooses among them at run time.
X86_LEVELS = {
    "baseline": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}
OTHER_LEVELS = {"baseline": []}
KERNELS = [source for source in sorted((CSRC / "cpu").glob("*.cpp")) if source.stem != "isa"]

GLIBC = "2.28"  # RHEL 8's, the oldest that wheels run on, as PyTorch's own do

CUDA_ARCHS = (80, 90, 100, 120)  # machine code serves its own major version from its minor version on


# ---- what there is to build with ----


@cache
def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or sysconfig.get_config_var("CXX").split()[0] or "c++")


@cache
def machine() -> str:
    """What the compiler compiles for, such as x86_64 or aarch64."""
    asked = [compiler(), "-dumpmachine"]
    said = subprocess.run(asked, check=False, capture_output=True, text=True).stdout if compiler() else ""
    return said.split("-")[0] or platform.machine()


def levels() -> dict[str, list[str]]:
    return X86_LEVELS if machine() == "x86_64" else OTHER_LEVELS


@cache
def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=os.path.join(home, "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def say(message: str) -> None:
    print(f"fastsparse: {message}", file=sys.stderr, flush=True)


def choice(variable: str) -> str:
    value = os.environ.get(variable) or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{variable}: must be 0 or 1, got {value!r}")
    return value


def for_all() -> bool:
    """Whether to make a wheel for every Python and old systems, by FASTSPARSE_WHEEL."""
    return choice("FASTSPARSE_WHEEL") == "1"


@cache
def cpu_wanted() -> bool:
    """Whether to build for the CPU, by FASTSPARSE_CPU and by what is here."""
    if choice("FASTSPARSE_CPU") == "0":
        return False
    if compiler() is None:
        if choice("FASTSPARSE_CPU") == "1":
            raise SystemExit("FASTSPARSE_CPU=1: no C++ compiler was found (set CXX)")
        say("no C++ compiler was found; installing without compiled kernels")
        return False
    return True


@cache
def cuda_wanted() -> bool:
    """Whether to build for CUDA, by FASTSPARSE_CUDA and by what is here."""
    asked = choice("FASTSPARSE_CUDA")
    if asked == "0" or (asked == "auto" and not cpu_wanted()):
        return False
    missing = "C++ compiler was found (set CXX)" if compiler() is None else "nvcc was found (set CUDA_HOME)"
    if compiler() is None or nvcc() is None:
        if asked == "1":
            raise SystemExit(f"FASTSPARSE_CUDA=1: no {missing}")
        say(f"no {missing}; installing without CUDA kernels")
        return False
    return True


@cache
def cuda_toolkit() -> str:
    """nvcc's version, such as 13.0."""
    said = subprocess.run([nvcc(), "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"release (\d+\.\d+)", said)[1]


@cache
def cuda_archs() -> tuple[int, ...]:
    """The compute capabilities to build for, ten times each, in rising order."""
    said = subprocess.run([nvcc(), "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    known = {int(arch) for arch in re.findall(r"compute_(\d+)\b", said)}
    asked = os.environ.get("FASTSPARSE_CUDA_ARCHS")
    if not asked:
        left_out = [f"sm_{arch}" for arch in CUDA_ARCHS if arch not in known]
        if left_out:
            say(f"nvcc {cuda_toolkit()} can't compile for {', '.join(left_out)}, which are left out")
        return tuple(arch for arch in CUDA_ARCHS if arch in known)
    archs = re.split(r"[\s,;]+", asked.strip())
    for arch in archs:
        if not arch.isdecimal() or int(arch) not in known:
            raise SystemExit(
                f"FASTSPARSE_CUDA_ARCHS: must be a list of what nvcc {cuda_toolkit()} can compile for "
                f"({', '.join(map(str, sorted(known)))}), got {asked!r}"
            )
    return tuple(sorted(set(map(int, archs))))


def cuda_contents() -> str:
    """What the CUDA library serves, as fastsparse.backend reads it: the machine codes, then the PTX."""
    return " ".join([*(f"sm_{arch}" for arch in cuda_archs()), *(f"compute_{arch}" for arch in portable())])


def portable() -> list[int]:
    """What there is PTX for: the newest and, for GPUs between that and it which have no code here, Hopper."""
    *others, newest = cuda_archs()
    return [*(arch for arch in others if arch == 90), newest]


# ---- what it is built with ----


def requirements(parts: Iterable[str]) -> list[str]:
    """The packages that parts are compiled and linked with."""
    needed = {"pybind11>=2.13" if part == "_host" else "torch>=2.10" for part in parts}
    return sorted(needed | ({"ziglang>=0.14"} if for_all() and needed else set()))


def release(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


def check(parts: Iterable[str]) -> None:
    """Miss what parts are compiled with now, rather than after most of the work."""
    parts = set(parts)
    for requirement in requirements(parts):
        name, least = requirement.split(">=")
        advice = f"pip install '{requirement}', or set FASTSPARSE_CPU=0 to go without compiled kernels"
        try:
            module = importlib.import_module(name)
            found = getattr(module, "__version__", None) or importlib.metadata.version(name)
        except ImportError as error:
            raise SystemExit(f"fastsparse: compiling needs {requirement} ({error}): {advice}") from error
        if release(found) < release(least):
            raise SystemExit(f"fastsparse: compiling needs {requirement}, got {found}: {advice}")
    if "_host" in parts and not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        raise SystemExit("fastsparse: compiling needs Python.h: on Debian, apt install python3-dev")


# ---- how ----


def flags() -> list[str]:
    """Flags of every file. No -ffast-math: NaN, infinities and the order of sums are part of the contract."""
    common = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
    common += ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-parameter"]
    common += [
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",
    ]  # false alarms inside GCC's own AVX-512 header
    if os.environ.get("FASTSPARSE_SANITIZE") == "1":
        common += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1", "-O1"]
    return [*common, *nameless()]


def nameless() -> list[str]:
    """What keeps the names of folders out of wheels, whose bytes depend on sources and tools alone."""
    if not for_all():
        return []
    import torch

    return [f"-ffile-prefix-map={folder}/=" for folder in (ROOT.resolve(), Path(torch.__file__).parents[1])]


def nvcc_flags() -> list[str]:
    """Flags of every CUDA file. -lineinfo tells profilers and sanitizers the source lines, for free."""
    common = ["-std=c++20", "-O3", "-lineinfo", "-ccbin", compiler(), "-Xptxas", "--warn-on-spills"]
    host = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-Wno-unused-parameter", *nameless()]
    common += ["-Xcompiler", ",".join(host)]
    common += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in cuda_archs()]
    return [*common, *(f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in portable())]


def torch_flags() -> list[str]:
    import torch

    include = Path(torch.__file__).parent / "include"
    return ["-isystem", str(include), f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]


def torch_libraries() -> list[str]:
    """What both op libraries link to. PyTorch's CUDA part needn't be here: csrc/cuda/edge.cu finds it."""
    import torch

    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu"]


def host_flags() -> list[str]:
    import pybind11

    return [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]


# ---- how a wheel for all is linked ----

ZIG = [sys.executable, "-m", "ziglang", "cc"]
EXPORTS = "{ global: fastsparse_*; local: *; };"


def beside_compiler(library: str) -> str:
    """Where the compiler keeps a library of its own."""
    asked = [compiler(), f"-print-file-name={library}"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


def torch_stub(folder: Path, objects: list[Path], target: str) -> str:
    """A libtorch_cpu.so with the names alone that are used: the real one here may be for other machines."""
    used = subprocess.run(
        ["nm", "--undefined-only", *objects], check=True, capture_output=True, text=True
    ).stdout
    names = sorted(set(re.findall(r"\bU ((?:aoti_)?torch_\w+)", used)))
    source, library = folder / "torch_stub.c", folder / "libtorch_cpu.so"
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in names))
    command = [
        *ZIG,
        "-target",
        target,
        "-shared",
        f"-Wl,-soname,{library.name}",
        str(source),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True)
    return str(library)


def cuda_runtime() -> list[str]:
    """CUDA's runtime, to go inside, from where nvcc would take it."""
    asked = [nvcc(), "--dryrun", "-shared", "-cudart", "static", "none.o", "-o", "none"]
    said = subprocess.run(asked, check=True, capture_output=True, text=True).stderr
    places = [Path(folder) / "libcudart_static.a" for folder in re.findall(r'"-L([^"]+)"', said)]
    return [str(next(place for place in places if place.exists()))]


def link_for_all(folder: Path, objects: list[Path], target: Path, more: list[str]) -> list[str]:
    """How zig, which knows the symbols of every glibc, links what our compiler has compiled.

    The C++ library is the system's, as with PyTorch's own wheels: exceptions pass from one to the other.
    libgcc comes before zig's like of it, whose description of the processor nobody fills in.
    """
    os.environ.setdefault("ZIG_GLOBAL_CACHE_DIR", str(ROOT / "build" / "zig"))
    system = f"{machine()}-linux-gnu.{GLIBC}"
    exports = folder / "exports"
    exports.write_text(EXPORTS)
    libraries = map(beside_compiler, ("libgcc.a", "libstdc++.so.6", "libgcc_s.so.1"))
    linked = [*map(str, objects), *more, *libraries, torch_stub(folder, objects, system)]
    system_libraries = ["-lm", "-ldl", "-lpthread", "-lrt"]
    return [
        *[*ZIG, "-target", system, "-shared", "-s", f"-Wl,--version-script={exports}"],
        *[*linked, *system_libraries, "-o", str(target)],
    ]


# ---- what the libraries are made of: what to compile, as (source, object, command), and how to link it ----

Job = tuple[Path, Path, list[str]]


def cpp(source: Path, target: Path, extra: list[str]) -> Job:
    return source, target, [compiler(), *flags(), f"-I{CSRC}", *extra]


def shared(objects: Path) -> list[Job]:
    """What both op libraries have of PyTorch's and, in wheels for all, of newer systems than the oldest."""
    jobs = [cpp(source, objects / f"{source.stem}.o", torch_flags()) for source in sorted(CSRC.glob("*.cpp"))]
    added = sorted((CSRC / "wheel").glob("*.cpp")) if for_all() else []
    return [*jobs, *(cpp(source, objects / f"{source.stem}.o", []) for source in added)]


def facts(objects: Path) -> list[Job]:
    """What tells of the build and of the processor."""
    cuda = [f'-DFASTSPARSE_CUDA="{cuda_toolkit()} {cuda_contents()}"'] if cuda_wanted() else []
    return [
        cpp(CSRC / "host" / "facts.cpp", objects / "facts.o", cuda),
        cpp(CSRC / "cpu" / "isa.cpp", objects / "isa.o", []),
    ]


def precompiled_header(objects: Path) -> Job:
    """Half of what csrc/cpu/edge takes, done once. A compiler that can't use it reads the header itself."""
    target = objects / "cpu" / "edge" / "precompiled.h.gch"
    return cpp(CSRC / "cpu" / "edge" / "precompiled.h", target, [*torch_flags(), "-x", "c++-header"])


def ops_cpu(objects: Path) -> tuple[list[Job], list[str], list[str]]:
    jobs = [
        cpp(
            kernel,
            objects / f"{kernel.stem}.{level}.o",
            [*isa, f"-DFASTSPARSE_ISA={level}"],
        )
        for kernel in KERNELS
        for level, isa in levels().items()
    ]
    precompiled = ["-iquote", str(objects), "-include", "cpu/edge/precompiled.h"]
    jobs += [
        cpp(source, objects / f"edge_{source.stem}.o", [*torch_flags(), *precompiled])
        for source in sorted((CSRC / "cpu" / "edge").glob("*.cpp"))
    ]
    jobs += [*shared(objects), *facts(objects)]
    return jobs, [compiler(), "-shared", *flags()], torch_libraries()


def ops_cuda(objects: Path) -> tuple[list[Job], list[str], list[str]]:
    told = [f"-I{CSRC}", *torch_flags(), f'-DFASTSPARSE_CUDA_CONTENTS="{cuda_contents()}"']
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    jobs = [(source, objects / f"{source.stem}.o", [nvcc(), *nvcc_flags(), *told]) for source in sources]
    jobs += shared(objects)
    # CUDA's runtime goes inside, and its symbols are kept there: PyTorch brings a runtime of its own.
    link = [nvcc(), "-shared", "-ccbin", compiler(), "-cudart", "static", "--no-device-link"]
    return jobs, [*link, "-Xlinker", "--exclude-libs=ALL"], torch_libraries()


def host(objects: Path) -> tuple[list[Job], list[str], list[str]]:
    jobs = [cpp(CSRC / "host" / "host.cpp", objects / "host.o", host_flags()), *facts(objects)]
    return jobs, [compiler(), "-shared", *flags()], []


PARTS = {"_ops_cpu": ops_cpu, "_ops_cuda": ops_cuda, "_host": host}


def weight(job: Job) -> int:
    """Roughly how long a file takes: what bears its name is large."""
    source, _, _ = job
    return sum(path.stat().st_size for path in source.parent.glob(f"{source.stem}.*"))


def compiled(source: Path, target: Path, command: list[str]) -> bool:
    """Compile a file where it, a header of its, PyTorch or the command has changed; whether one had."""
    from torch import __version__

    record, depends = target.with_suffix(".command"), target.with_suffix(".d")
    told = f"{__version__}\n{command}"
    if target.exists() and record.exists() and record.read_text() == told and depends.exists():
        files = re.split(r"\s+", depends.read_text().split(":", 1)[1].replace("\\\n", " ").strip())
        if all(os.path.exists(file) and os.path.getmtime(file) < target.stat().st_mtime for file in files):
            return False
    record.unlink(missing_ok=True)
    command = [*command, "-MMD", "-MF", str(depends), "-c", str(source), "-o", str(target)]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"fastsparse: compiling {source.relative_to(ROOT)} failed: {' '.join(command)}")
    record.write_text(told)
    return True


class BuildKernels(build_ext):
    """Compiles what has changed, in parallel, and links a shared library of each part."""

    def run(self) -> None:
        check(ext.name.split(".")[-1] for ext in self.extensions)
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.split(".")[-1].startswith("_ops_"):  # no Python in it: no Python version in its name
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extension(self, ext: Extension) -> None:
        start = time.monotonic()
        part = ext.name.split(".")[-1]
        objects = Path(self.build_temp) / ext.name
        (objects / "cpu" / "edge").mkdir(parents=True, exist_ok=True)
        jobs, link, libraries = PARTS[part](objects)
        if self.force:
            for _, target, _ in jobs:
                target.unlink(missing_ok=True)
        if part == "_ops_cpu":
            compiled(*precompiled_header(objects))
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            count = sum(pool.map(lambda job: compiled(*job), sorted(jobs, key=weight, reverse=True)))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        files = [object_file for _, object_file, _ in jobs]
        if for_all():
            self.spawn(link_for_all(objects, files, target, cuda_runtime() if part == "_ops_cuda" else []))
        else:
            self.spawn([*link, *map(str, files), "-o", str(target), *libraries])
        serves = f" for {cuda_contents()}" if part == "_ops_cuda" else ""
        say(f"{part}{serves}: compiled {count} of {len(jobs)} files, {time.monotonic() - start:.0f} s")


def wanted() -> list[str]:
    """The parts to build."""
    cpu = ["_ops_cpu"] if for_all() else ["_ops_cpu", "_host"]
    return [*(cpu if cpu_wanted() else []), *(["_ops_cuda"] if cuda_wanted() else [])]


# ---- as a build backend: https://peps.python.org/pep-0517/ ----


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *requirements(wanted())]


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *requirements(wanted())]


# ---- wheels for all ----


def source_digest() -> str:
    """One hash of all that is compiled, installed, or says how."""
    folders = [path for name in ("csrc", "kernels", "fastsparse") for path in (ROOT / name).rglob("*")]
    sources = [path for path in folders if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")]
    digest = hashlib.sha256()
    for path in sorted([*sources, ROOT / "setup.py", ROOT / "pyproject.toml"]):
        digest.update(f"{path.relative_to(ROOT)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def bill_of_materials(name: str, version: str) -> dict:
    """What a wheel is made of and with, in CycloneDX 1.6; when is left out: equal inputs make equal bytes."""
    from_pypi = {
        package: importlib.metadata.version(package) for package in ("setuptools", "torch", "ziglang")
    }
    said = subprocess.run([compiler(), "--version"], check=True, capture_output=True, text=True).stdout
    facts = {"machine": machine(), "glibc": GLIBC, "parts": " ".join(wanted()), "levels": " ".join(levels())}
    tools = [
        {"type": "application", "name": package, "version": found, "purl": f"pkg:pypi/{package}@{found}"}
        for package, found in from_pypi.items()
    ]
    tools.append({"type": "application", "name": Path(compiler()).name, "version": said.splitlines()[0]})
    if cuda_wanted():
        tools.append({"type": "application", "name": "cuda", "version": cuda_toolkit()})
        facts["gpu-code"] = cuda_contents()
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "library",
                "name": name,
                "version": version,
                "purl": f"pkg:pypi/{name}@{version}",
                "licenses": [{"license": {"id": "Apache-2.0"}}],
                "properties": [
                    {"name": f"fastsparse:{fact}", "value": value}
                    for fact, value in [*facts.items(), ("source-sha256", source_digest())]
                ],
            },
        },
        "components": [{**tool, "scope": "excluded"} for tool in tools],  # none of them is needed to run it
    }


class WheelForAll(bdist_wheel):
    """Says what the wheel runs on and what it is made of; equal inputs make equal bytes."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", f"manylinux_{GLIBC.replace('.', '_')}_{machine()}"

    def run(self) -> None:
        os.environ.setdefault("SOURCE_DATE_EPOCH", "315532800")  # 1980, where the zip format's time begins
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)  # what others left
        super().run()

    def write_wheelfile(self, folder: str, *arguments: str) -> None:
        super().write_wheelfile(folder, *arguments)
        metadata = self.distribution.metadata
        made_of = bill_of_materials(metadata.get_name(), metadata.get_version())
        sboms = Path(folder) / "sboms"  # https://peps.python.org/pep-0770/
        sboms.mkdir()
        (sboms / "fastsparse.cdx.json").write_text(json.dumps(made_of, indent=2) + "\n")
        for path in Path(self.bdist_dir).rglob("*"):  # whatever umask the sources came by
            path.chmod(0o755 if path.is_dir() or path.suffix == ".so" else 0o644)


def commands() -> dict:
    """What setuptools is told of how to build."""
    if not (for_all() and wanted()):
        return {"cmdclass": {"build_ext": BuildKernels}}
    return {
        "cmdclass": {"build_ext": BuildKernels, "bdist_wheel": WheelForAll},
        "options": {"build": {"build_base": f"build/wheel-{machine()}"}},  # its own, as its flags are
    }


if __name__ == "__main__":
    setup(
        packages=[
            "fastsparse",
            "fastsparse.kernels",
            *(f"fastsparse.{path.parent.name}" for path in sorted(ROOT.glob("fastsparse/*/__init__.py"))),
        ],
        package_dir={"fastsparse": "fastsparse", "fastsparse.kernels": "kernels"},
        ext_modules=[Extension(f"fastsparse.{part}", []) for part in wanted()],
        **commands(),
    )
