"""Which backends can run here, why the others can't, and how to insist on one.

Backends by name: ``reference`` (plain PyTorch, any device), ``cpu`` (C++, vectorised), ``triton``, ``cuda``.
Without a name the fastest available one for the tensor's device runs. A backend that is named is used, or
an error says why it can't be: there is no silent fallback.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

NAMES = ("reference", "cpu", "triton", "cuda")
CPU_LEVELS = ("baseline", "avx2", "avx512")


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


class _CpuLibrary:
    """The compiled CPU kernels: loading them registers them with PyTorch's dispatcher."""

    def __init__(self) -> None:
        self.failure: str | None = None
        path = Path(__file__).parent / "_ops_cpu.so"
        if not path.exists():
            self.failure = f"{path.name} was not built: install with a C++ compiler, or use a wheel"
            return
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            self.failure = f"{path.name} could not be loaded: {error}"
            return
        level = os.environ.get("FASTSPARSE_CPU_LEVEL")
        if level is not None:
            self.set_level(level)

    @property
    def level(self) -> str:
        return CPU_LEVELS[self._library.fastsparse_cpu_level()]

    @property
    def best_level(self) -> str:
        return CPU_LEVELS[self._library.fastsparse_cpu_best_level()]

    def set_level(self, level: str) -> None:
        if level not in CPU_LEVELS:
            raise ValueError(f"FASTSPARSE_CPU_LEVEL: must be one of {', '.join(CPU_LEVELS)}, got {level!r}")
        if CPU_LEVELS.index(level) > CPU_LEVELS.index(self.best_level):
            raise RuntimeError(
                f"FASTSPARSE_CPU_LEVEL: {level} was asked for, this CPU goes up to {self.best_level}"
            )
        self._library.fastsparse_cpu_set_level(CPU_LEVELS.index(level))


_cpu = _CpuLibrary()
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
    return Backend(name, True, f"C++, instruction-set level {_cpu.level}, up to {_cpu.best_level} here")


def _failure(name: str) -> str | None:
    """Why a backend can't run. Asks the library nothing: torch.compile traces this and can't trace ctypes."""
    if name == "reference":
        return None
    if name == "cpu":
        return _cpu.failure
    return f"this version of fastsparse has no {name} kernels"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every fastsparse op in the block on one backend, or fail with the reason why it can't.

    The choice holds for the whole process, its other threads included, while the block lasts; the
    environment variable ``FASTSPARSE_BACKEND`` makes it from the start.

    Args:
        name: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend can't run in this process.

    Example:
        >>> import torch, fastsparse
        >>> with fastsparse.use_backend("reference"):
        ...     code = fastsparse.topk_encode(torch.eye(2), torch.eye(2), k=1)
    """
    _check_name(name, "use_backend")
    _require(name)
    global _requested
    before, _requested = _requested, name
    try:
        yield
    finally:
        _requested = before


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
    _require(_requested)
    device = "cpu" if _requested == "cpu" else "cuda"
    if x.device.type != device:
        raise RuntimeError(
            f"backend {_requested!r} was asked for and runs on {device} tensors, got one on {x.device}"
        )
    return False


@contextmanager
def use_cpu_level(level: str) -> Iterator[None]:
    """Run the CPU kernels of the whole process at one instruction-set level: baseline, avx2 or avx512."""
    _require("cpu")
    before = _cpu.level
    _cpu.set_level(level)
    try:
        yield
    finally:
        _cpu.set_level(before)
