"""Builds the compiled parts: ``_ops_cpu`` (PyTorch's stable ABI) and ``_host`` (pybind11).

Environment:
    FASTSPARSE_CPU=1        a missing C++ compiler is an error (default: the install runs on the reference)
    FASTSPARSE_CPU=0        leave the compiled parts out
    FASTSPARSE_SANITIZE=1   build with AddressSanitizer and UndefinedBehaviorSanitizer
    CXX                     the compiler
    MAX_JOBS                how many files are compiled at once (default: the number of CPUs)
"""

import os
import platform
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TORCH_TARGET = "0x020a000000000000"  # the oldest torch that the binary serves: 2.10

# Every kernel file is compiled once for each level; csrc/cpu/isa.cpp chooses among them at run time.
X86_LEVELS = {
    "baseline": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}
OTHER_LEVELS = {"baseline": []}
KERNELS = ["topk_encode", "spmm", "sddmm", "spmm_t"]


def levels() -> dict[str, list[str]]:
    return X86_LEVELS if platform.machine() in ("x86_64", "AMD64") else OTHER_LEVELS


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or sysconfig.get_config_var("CXX").split()[0] or "c++")


def wanted() -> bool:
    """Whether to build the compiled parts, by FASTSPARSE_CPU and by what is here."""
    choice = os.environ.get("FASTSPARSE_CPU", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"FASTSPARSE_CPU: must be 0 or 1, got {choice!r}")
    if choice == "0":
        return False
    if compiler() is None:
        if choice == "1":
            raise SystemExit("FASTSPARSE_CPU=1: no C++ compiler was found (set CXX)")
        print("fastsparse: no C++ compiler was found; installing without compiled kernels", file=sys.stderr)
        return False
    return True


def flags() -> list[str]:
    """Flags of every file. No -ffast-math: NaN, infinities and the order of sums are part of the contract."""
    common = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
    common += ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-parameter"]
    common += [
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",
    ]  # false alarms inside GCC's own AVX-512 header
    if os.environ.get("FASTSPARSE_SANITIZE") == "1":
        common += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]
    return common


def torch_flags() -> list[str]:
    import torch

    include = Path(torch.__file__).parent / "include"
    return [f"-I{include}", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]


def host_flags() -> list[str]:
    import pybind11

    return [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]


class BuildKernels(build_ext):
    """Compiles each object with its own flags, in parallel, and links two shared libraries."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.split(".")[-1] == "_ops_cpu":  # no Python in it: no Python version in its name
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extension(self, ext: Extension) -> None:
        csrc, objects = ROOT / "csrc", Path(self.build_temp) / ext.name
        if ext.name == "fastsparse._ops_cpu":
            jobs = [
                (csrc / "cpu" / f"{kernel}.cpp", objects / f"{kernel}.{level}.o",
                 [*isa, f"-DFASTSPARSE_ISA={level}"])
                for kernel in KERNELS
                for level, isa in levels().items()
            ]  # fmt: skip
            edge = torch_flags()
            jobs += [
                (source, objects / f"edge_{source.stem}.o", edge)
                for source in sorted((csrc / "cpu" / "edge").glob("*.cpp"))
            ]
            jobs += [(csrc / "tensors.cpp", objects / "tensors.o", edge)]
            jobs += [(csrc / "cpu" / "isa.cpp", objects / "isa.o", [])]
        else:
            jobs = [(csrc / "host" / "host.cpp", objects / "host.o", host_flags())]
            jobs += [(csrc / "cpu" / "isa.cpp", objects / "isa.o", [])]
        objects.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            built = list(pool.map(lambda job: self._compile(*job), jobs))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        libraries = []
        if ext.name == "fastsparse._ops_cpu":
            import torch

            libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu"]
        self.spawn([compiler(), "-shared", *flags(), *map(str, built), "-o", str(target), *libraries])

    def _compile(self, source: Path, target: Path, extra: list[str]) -> Path:
        headers = (ROOT / "csrc").rglob("*.h")
        newest = max(path.stat().st_mtime for path in (source, Path(__file__), *headers))
        if self.force or not target.exists() or target.stat().st_mtime < newest:
            self.spawn(
                [compiler(), "-c", str(source), "-o", str(target), *flags(), f"-I{ROOT / 'csrc'}", *extra]
            )
        return target


extensions = [Extension("fastsparse._ops_cpu", []), Extension("fastsparse._host", [])] if wanted() else []

setup(
    packages=[
        "fastsparse",
        "fastsparse.kernels",
        *(f"fastsparse.{path.parent.name}" for path in sorted(ROOT.glob("fastsparse/*/__init__.py"))),
    ],
    package_dir={"fastsparse": "fastsparse", "fastsparse.kernels": "kernels"},
    ext_modules=extensions,
    cmdclass={"build_ext": BuildKernels},
)
