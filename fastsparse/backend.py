"""Which backends can run here, why the others can't, and how to insist on one.

Backends by name: ``reference`` (plain PyTorch, any device), ``cpu`` (C++, vectorised), and on GPUs ``triton``
and ``cuda`` (C++). Without a name the fastest available one for the tensor's device runs. A backend that is
named is used, or an error says why it can't be: there is no silent fallback.
"""

import ctypes
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

NAMES = ("reference", "cpu", "triton", "cuda")
GPU_NAMES = ("triton", "cuda")
DEVICES = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}  # whose tensors it runs on; the reference on all
CPU_LEVELS = ("baseline", "avx2", "avx512")
OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)  # of NVIDIA GPUs, for Triton's kernels; the CUDA library says what it serves


@dataclass(frozen=True)
class Backend:
    """One backend: whether it can run in this process, and what it is or why it can't."""

    name: str
    available: bool
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {'available' if self.available else 'unavailable'} ({self.detail})"


def _check_name(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}: backend must be one of {', '.join(NAMES)}, got {name!r}")
    return name


_forms: dict[str, str] = {}


def tell_libraries(op: str, form: str) -> None:
    """Tell compiled kernels what an op demands of its tensors; those that are loaded later are told then."""
    _forms[op] = form
    for library in (_cpu.library, _cuda.library):
        if library is not None:
            library.fastsparse_tell_form(op.encode(), form.encode())


def load_kernels(path: Path) -> ctypes.CDLL:
    """A library of kernels, which registers them with PyTorch's dispatcher."""
    library = ctypes.CDLL(str(path))
    tell = library.fastsparse_tell_form
    for op, form in _forms.items():
        tell(op.encode(), form.encode())
    return library


class _CpuLibrary:
    """The compiled CPU kernels."""

    def __init__(self) -> None:
        self.failure: str | None = None
        self.library: ctypes.CDLL | None = None
        path = Path(__file__).parent / "_ops_cpu.so"
        if not path.exists():
            self.failure = f"{path.name} was not built: install with a C++ compiler, or use a wheel"
            return
        try:
            self.library = load_kernels(path)
        except (OSError, AttributeError) as error:
            self.failure = f"{path.name} could not be loaded: {error}"
            return
        level = os.environ.get("FASTSPARSE_CPU_LEVEL")
        if level is not None:
            self.set_level(level)

    @property
    def level(self) -> str:
        return CPU_LEVELS[self.library.fastsparse_cpu_level()]

    @property
    def best_level(self) -> str:
        return CPU_LEVELS[self.library.fastsparse_cpu_best_level()]

    @cached_property
    def prefers_onednn(self) -> bool:
        """Whether fp32 products are faster by oneDNN than where PyTorch takes them, on this processor."""
        if self.library is None:
            return False
        self.library.fastsparse_cpu_prefers_onednn.restype = ctypes.c_bool
        return self.library.fastsparse_cpu_prefers_onednn()

    def facts(self, about: str) -> dict:
        """What the library says of its ``build`` or of this ``cpu``."""
        say = self.library[f"fastsparse_{about}_facts"]
        say.restype = ctypes.c_char_p
        return json.loads(say())

    def check_level(self, level: str) -> None:
        if level not in CPU_LEVELS:
            raise ValueError(f"FASTSPARSE_CPU_LEVEL: must be one of {', '.join(CPU_LEVELS)}, got {level!r}")
        if CPU_LEVELS.index(level) > CPU_LEVELS.index(self.best_level):
            raise RuntimeError(
                f"FASTSPARSE_CPU_LEVEL: {level} was asked for, this CPU goes up to {self.best_level}"
            )

    def set_level(self, level: str) -> None:
        self.check_level(level)
        self.library.fastsparse_cpu_set_level(CPU_LEVELS.index(level))


class _CudaLibrary:
    """The compiled CUDA kernels, loaded when they are first asked for.

    They are in a namespace of their own: ops/_gpu.py calls them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.library: ctypes.CDLL | None = None

    @cached_property
    def failure(self) -> str | None:
        """Why the library can't be used in this process, on any device."""
        if not self._path.exists():
            return f"{self._path.name} was not built: install with nvcc, or use a wheel that has it"
        try:
            library = load_kernels(self._path)
            library.fastsparse_cuda_failure.restype = ctypes.c_char_p
            library.fastsparse_cuda_contents.restype = ctypes.c_char_p
        except (OSError, AttributeError) as error:
            return f"{self._path.name} could not be loaded: {error}"
        self.library = library
        failure = library.fastsparse_cuda_failure()
        return None if failure is None else failure.decode()

    @cached_property
    def contents(self) -> str:
        """What was compiled: ``sm_90`` is machine code, ``compute_90`` code for the driver to compile."""
        return self.library.fastsparse_cuda_contents().decode()

    def serves(self, major: int, minor: int) -> bool:
        """Whether there is code for a compute capability.

        Machine code runs on its own major version from its minor version on, portable code on all that follow
        ("CUDA C++ Programming Guide", section "Compute Capability and Compatibility").
        """
        for kind, *version in re.findall(r"(sm|compute)_(\d+)(\d)", self.contents):
            had = tuple(map(int, version))
            if had <= (major, minor) and (kind == "compute" or had[0] == major):
                return True
        return False


_cpu = _CpuLibrary()
_cuda = _CudaLibrary(Path(__file__).parent / "_ops_cuda.so")
# A plain global, because torch.compile can guard on one and can't trace a context variable.
_requested: str | None = os.environ.get("FASTSPARSE_BACKEND")
if _requested is not None:
    _check_name(_requested, "FASTSPARSE_BACKEND")


def backends() -> dict[str, Backend]:
    """What can run in this process and, for each backend that can't, why.

    Returns:
        A dict from backend name to :class:`Backend`, fastest on its device last.

    Example:
        >>> import fastsparse
        >>> fastsparse.backends()["reference"].available
        True
    """
    return {name: _describe(name) for name in NAMES}


def _describe(name: str) -> Backend:
    failure = _failure(name)
    if failure is not None:
        return Backend(name, False, failure)
    if name == "reference":
        return Backend(name, True, "plain PyTorch, every device, slow")
    if name == "cpu":
        return Backend(name, True, f"C++, instruction-set level {_cpu.level}, up to {_cpu.best_level} here")
    detail = f"Triton {import_triton().__version__}" if name == "triton" else f"CUDA C++, {_cuda.contents}"
    for index, reason in enumerate(_failures_by_device(name)):
        if reason is not None:
            detail += f"; not on cuda:{index}: {reason}"
    return Backend(name, True, detail)


def _failure(name: str) -> str | None:
    """Why a backend can't run on any device here.

    Of ``cpu`` it asks the library nothing: torch.compile traces this and can't trace ctypes.
    """
    if name == "reference":
        return None
    if name == "cpu":
        return _cpu.failure
    if torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "no GPU was found: torch.cuda.is_available() is False"
    failures = _failures_by_device(name)
    return None if None in failures else failures[0]


def _failures_by_device(name: str) -> list[str | None]:
    return [device_failure(name, index) for index in range(torch.cuda.device_count())]


@cache
def device_failure(name: str, index: int) -> str | None:
    """Why a GPU backend can't run on one of the devices, which exists; None where it can."""
    device = torch.cuda.get_device_properties(index)
    amd, gpu = torch.version.hip is not None, f"{device.name} is sm_{device.major}{device.minor}"
    if name == "triton":
        if not amd and (device.major, device.minor) < OLDEST_CAPABILITY:
            return f"{gpu}: the kernels need sm_{OLDEST_CAPABILITY[0]}{OLDEST_CAPABILITY[1]} or later"
        return _triton_failure()
    if amd:
        return "these kernels are for NVIDIA's GPUs: on AMD's, Triton serves"
    if _cuda.failure is None and not _cuda.serves(device.major, device.minor):
        return f"{gpu}: the library holds {_cuda.contents}"
    return _cuda.failure


def compiled() -> dict:
    """What the CPU library says of its build and of this CPU, or why there is none."""
    if _cpu.failure is not None:
        return {"available": False, "detail": _cpu.failure}
    return {"build": _cpu.facts("build"), "cpu_features": _cpu.facts("cpu")}


def import_triton():
    """Triton, which is imported nowhere before it is needed."""
    import triton

    return triton


@cache
def _triton_failure() -> str | None:
    try:
        version = import_triton().__version__
    except Exception as error:  # whatever is wrong with it, everything else still works
        return f"triton can't be imported: {error}"
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TRITON:
        return f"triton {version} is too old: {'.'.join(map(str, OLDEST_TRITON))} or later is needed"
    return None


@dataclass(frozen=True, eq=False)
class _Block:
    owner: tuple[int, object]
    choice: str


class _Blocks:
    """The blocks that choose a setting of the whole process, in the order in which they were entered.

    There is one setting at a time, so that blocks of several threads or tasks that last at once must choose
    the same. Each takes away its own choice as it ends, in whatever order they do.
    """

    def __init__(self, what: str, read: Callable[[], str | None], write: Callable[..., None]) -> None:
        self._what, self._read, self._write = what, read, write
        self._lasting: list[_Block] = []
        self._lock = threading.Lock()
        self._outside: str | None = None

    @contextmanager
    def enter(self, choice: str) -> Iterator[None]:
        block = _Block(_running(), choice)
        with self._lock:
            for other in self._lasting:
                if other.owner != block.owner and other.choice != choice:
                    raise RuntimeError(
                        f"{self._what}: {choice!r} can't be chosen while a block of another thread or task "
                        f"lasts that chose {other.choice!r}: the choice holds for the whole process"
                    )
            if not self._lasting:
                self._outside = self._read()
            self._lasting.append(block)
            self._write(choice)
        try:
            yield
        finally:
            with self._lock:
                self._lasting.remove(block)
                self._write(self._lasting[-1].choice if self._lasting else self._outside)


def _running() -> tuple[int, object]:
    """The thread, and in an event loop of asyncio the task, that runs this."""
    task = None
    if (asyncio := sys.modules.get("asyncio")) is not None:
        with suppress(RuntimeError):  # there is no event loop
            task = asyncio.current_task()
    return threading.get_ident(), task


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every fastsparse op in the block on one backend, or fail with the reason why it can't.

    The choice holds for the whole process, its other threads included, while the block lasts, and for
    gradients that are taken then; the environment variable ``FASTSPARSE_BACKEND`` makes it from the start.
    Blocks nest. Those of several threads, or tasks of asyncio, may last at once if they name one backend.

    Args:
        name: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend can't run in this process, or a block of another thread or task, on another
            backend, still lasts.

    Example:
        >>> import torch, fastsparse
        >>> with fastsparse.use_backend("reference"):
        ...     code = fastsparse.topk_encode(torch.eye(2), torch.eye(2), k=1)
    """
    _check_name(name, "use_backend")
    if name in GPU_NAMES and torch.compiler.is_compiling():  # a compiled graph asks when it runs
        raise RuntimeError(f"use_backend: enter {name!r} outside of what torch.compile compiles")
    _require(name)
    if torch.compiler.is_compiling():  # the graph has the choice in it, and makes none when it runs
        global _requested
        before, _requested = _requested, name
        try:
            yield
        finally:
            _requested = before
    else:
        with _backend_blocks.enter(name):
            yield


def _require(name: str) -> None:
    failure = _failure(name)
    if failure is not None:
        raise RuntimeError(f"backend {name!r} was asked for and can't run here: {failure}")


def wants_reference(x: Tensor) -> bool:
    """Whether the plain PyTorch definition was asked for; raises if a named backend can't serve ``x``."""
    if _requested is None:
        return False
    if _requested == "reference":
        return True
    device = DEVICES[_requested]
    if _requested == "cpu" or x.device.type != device:  # on a GPU, ops/_gpu.py insists, knowing the device
        _require(_requested)
    if x.device.type != device:
        raise RuntimeError(
            f"backend {_requested!r} was asked for and runs on {device} tensors, got one on {x.device}"
        )
    return False


def requested() -> str | None:
    """The backend that was asked for, if one was."""
    return _requested


@contextmanager
def use_cpu_level(level: str) -> Iterator[None]:
    """Run the CPU kernels of the whole process at one instruction-set level: baseline, avx2 or avx512.

    Blocks nest, and may overlap, as those of :func:`use_backend`.
    """
    _require("cpu")
    _cpu.check_level(level)
    with _level_blocks.enter(level):
        yield


def _request(name: str | None) -> None:
    global _requested
    _requested = name


_backend_blocks = _Blocks("use_backend", lambda: _requested, _request)
_level_blocks = _Blocks("use_cpu_level", lambda: _cpu.level, _cpu.set_level)
