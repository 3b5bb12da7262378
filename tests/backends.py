"""Every way in which an op can run in the tests, GPU kernels included, with or without a GPU.

The op tests hand CPU tensors to the public functions. For a GPU backend the CPU implementation of every op is
replaced while a test runs, so that validation, autograd and dispatch are those of production:

- ``triton-interpreted``: kernels/<op>.py under Triton's interpreter, see triton_interpreter.py;
- ``cuda-emulated``: csrc/cuda/<op>.cu compiled for the CPU by tests/cuda_emulation;
- ``triton-gpu`` and ``cuda-gpu``: the real thing, on copies that keep every stride, offset and misalignment.

What a backend can't run is skipped here, in one place, with the reason; pytest counts the skips by reason.
"""

import ctypes
import importlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import hypothesis
import pytest
import torch
import triton_interpreter
from cuda_emulation import build as emulator
from knobs import turned
from samples import work
from torch import Tensor

import fastsparse
from fastsparse.backend import CPU_LEVELS, _cpu, _cuda, use_cpu_level
from fastsparse.ops._library import OPS

SCREENS = {"screened": 1, "integers": 2}  # of bf16, which GPUs have too, and of integers


def host_backend_names(*, screened: bool = False) -> list[str]:
    """Every way in which an op runs on CPU tensors: the reference, and each level of the compiled kernels.

    With ``screened`` also each level with either low-precision screen wherever it is possible at all.
    Without compiled kernels "registered" stands in: the ops' own dispatch and gradients over the reference.
    """
    if not fastsparse.backends()["cpu"].available:
        return ["reference", "registered"]
    levels = CPU_LEVELS[: CPU_LEVELS.index(_cpu.best_level) + 1]
    modes = ("", *(f"-{screen}" for screen in SCREENS)) if screened else ("",)
    return ["reference", *(f"cpu-{level}{mode}" for level in levels for mode in modes)]


def backend_names(*, screened: bool = False) -> list[str]:
    """:func:`host_backend_names`, and the GPU backends that can run here; test_backends.py shows why not."""
    names = [name for name in GPU_BACKENDS if not missing(name)]
    if screened:
        names += [f"{name}-screened" for name in names if GPU_BACKENDS[name].library is not None]
    return [*host_backend_names(screened=screened), *names]


@contextmanager
def running(backend: str) -> Iterator[None]:
    """Run ops on one of :func:`backend_names`."""
    with ExitStack() as stack:
        if (gpu := GPU_BACKENDS.get(backend.removesuffix("-screened"))) is not None:
            stack.enter_context(_replaced(OPS, partial(_run, gpu)))
            if backend.endswith("-screened"):
                stack.enter_context(turned(gpu.library(), screening=1))
        elif backend != "registered":
            name, level, screen = (*backend.split("-"), None, None)[:3]
            stack.enter_context(fastsparse.use_backend(name))
            if level:
                stack.enter_context(use_cpu_level(level))
                bare = [op for op, record in OPS.items() if "cpu" not in record.kernels]
                stack.enter_context(_replaced(bare, _defined))
            if screen:
                stack.enter_context(turned(_cpu.library, screening=SCREENS[screen], strassen=1))
        yield


def missing(backend: str) -> str | None:
    """Why a GPU backend can't run in this process, or None."""
    return GPU_BACKENDS[backend].missing()


@dataclass(frozen=True)
class GpuBackend:
    """How the tests run a GPU backend on CPU tensors."""

    missing: Callable[[], str | None]
    run: Callable  # of an op's name and its arguments
    kernels: str | None = None  # whose they are, triton's or cuda's, which not every op has; None: it has all
    work: float = math.inf  # the largest call that ends in the time that a test may take
    library: Callable[[], ctypes.CDLL] | None = None  # which has a screen that can be forced


@contextmanager
def _replaced(ops: Iterable[str], run: Callable) -> Iterator[None]:
    """Make ``run``, of an op's name and its arguments, the CPU implementation of ops."""
    library = torch.library.Library("fastsparse", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")  # of what is replaced
            for op in ops:
                library.impl(op, partial(run, op), "CPU", allow_override=True)
        yield
    finally:
        library._destroy()  # brings the compiled kernels back


def _defined(op: str, *arguments):
    """An op without a kernel for CPUs, which who names that backend is refused: here the reference serves."""
    OPS[op].form.check(op, arguments)
    return OPS[op].define(*arguments)


def _run(backend: GpuBackend, name: str, *arguments):
    op = OPS[name]
    if backend.kernels not in (None, *op.kernels):
        leave_out(f"{name} has no {backend.kernels} kernel")
    if work(name, arguments) > backend.work:
        leave_out("the shape is too large for GPU kernels without a GPU")
    if op.check is not None:  # as fastsparse.ops._gpu does, before it runs a kernel
        op.check(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        try:
            op.form.check_indices(name, arguments)
        except (IndexError, ValueError):
            patch.setenv("FASTSPARSE_DEBUG", "1")  # else a GPU takes indices and offsets on trust
        return backend.run(name, *arguments)


def leave_out(reason: str) -> None:
    """End the test here as skipped; inside a property test, end its example."""
    if hypothesis.currently_in_test_context():
        hypothesis.reject()
    pytest.skip(reason)


# Triton's interpreter.


def _interpreted(op: str, *arguments):
    module = _in_triton(op, arguments[0].dtype)
    OPS[op].form.check(op, arguments)
    OPS[op].form.check_indices(op, arguments)
    with torch.autocast("cpu", enabled=False), triton_interpreter.interpreting():
        return getattr(module, op)(*arguments)


def _in_triton(op: str, dtype: torch.dtype):
    """The module of Triton's kernel; what it isn't for is left out."""
    module = importlib.import_module(f"fastsparse.kernels.{op}")
    if dtype not in module.DTYPES:
        leave_out(f"Triton's {op} isn't for {str(dtype)[6:]}")
    return module


# The CUDA emulator.


def _emulated(op: str, *arguments):
    emulator.load()
    return getattr(torch.ops.fastsparse_cuda, op).default(*arguments)


# A GPU.


def _absent(name: str) -> str | None:
    backend = fastsparse.backends()[name]
    return None if backend.available else backend.detail


def _on_gpu(name: str, op: str, *arguments):
    if name == "triton":
        _in_triton(op, arguments[0].dtype)
    there = [on_device(value) if isinstance(value, Tensor) else value for value in arguments]
    with fastsparse.use_backend(name):
        out = getattr(torch.ops.fastsparse, op).default(*there)
    for value, copy in zip(arguments, there, strict=True):
        if isinstance(value, Tensor):
            assert torch.equal(_bytes(value), _bytes(copy).cpu()), f"{op} wrote to its input"
    return tuple(tensor.cpu() for tensor in out) if isinstance(out, tuple) else out.cpu()


def on_device(tensor: Tensor) -> Tensor:
    """A tensor on the GPU, in a copy of its whole storage: strides, offset and what lies between are kept."""
    storage = _bytes(tensor).cuda().untyped_storage()
    return torch.empty(0, dtype=tensor.dtype, device="cuda").set_(
        storage, tensor.storage_offset(), tensor.shape, tensor.stride()
    )


def _bytes(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


GPU_BACKENDS = {
    "triton-interpreted": GpuBackend(triton_interpreter.unavailable, _interpreted, "triton", work=7e6),
    "cuda-emulated": GpuBackend(emulator.unavailable, _emulated, "cuda", work=2e7, library=emulator.load),
    "triton-gpu": GpuBackend(partial(_absent, "triton"), partial(_on_gpu, "triton"), "triton"),
    "cuda-gpu": GpuBackend(
        partial(_absent, "cuda"), partial(_on_gpu, "cuda"), "cuda", library=lambda: _cuda.library
    ),
}
