"""CUDA tensors: what every kernel needs around it."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

import torch

from fastsparse import backend
from fastsparse.ops._choice import choose

if TYPE_CHECKING:
    from fastsparse.ops._library import Op


def implementation(op: "Op") -> Callable:
    """What ``fastsparse::<op>`` does with CUDA tensors."""

    def run(*arguments):
        x = arguments[0]
        name = _chosen(op, x.dtype, x.device.index, backend.requested())
        if name == "cuda":  # which looks at its tensors, and at FASTSPARSE_DEBUG, itself
            if op.check is not None:
                op.check(*arguments)
            return _run_cuda(op.name, arguments)
        op.form.check(op.name, arguments)
        if name == "reference":
            return op.define(*arguments)
        op.look_at(arguments)
        return _run_triton(op.name, arguments)

    return run


@cache
def _chosen(op: "Op", dtype: torch.dtype, device: int, requested: str | None) -> str:
    def failure(name: str) -> str | None:
        reason = backend.device_failure(name, device)
        if reason is None and name == "triton" and dtype not in _triton_kernel(op.name).DTYPES:
            reason = f"Triton's kernel isn't for {str(dtype)[6:]}"
        return reason

    name = choose(op, "cuda", requested, failure)
    if name == "cuda":
        _out_of_memory_since_last_asked(device)
    return name


@cache
def _triton_kernel(op: str):
    return import_module(f"fastsparse.kernels.{op}")


def _run_triton(op: str, arguments: tuple):
    x = arguments[0]
    with ExitStack() as stack:
        if x.device.index != torch.cuda.current_device():  # Triton launches on the current device
            stack.enter_context(torch.cuda.device(x.device))
        if torch.is_autocast_enabled(
            x.device.type
        ):  # which would take the wrapper's own products down to halves
            stack.enter_context(torch.autocast(x.device.type, enabled=False))
        return getattr(_triton_kernel(op), op)(*arguments)


def _run_cuda(op: str, arguments: tuple):
    try:
        return getattr(torch.ops.fastsparse_cuda, op).default(*arguments)
    except RuntimeError as error:
        device = arguments[0].device
        # Before PyTorch 2.13 all that is known is that a call failed; its count of such failures tells why.
        if "PyTorch failed" not in str(error) or not _out_of_memory_since_last_asked(device.index):
            raise
        free, total = torch.cuda.mem_get_info(device)
        sizes = (f"{size / 2**30:.2f} GiB" for size in (free, total, torch.cuda.memory_reserved(device)))
        raise torch.OutOfMemoryError(
            "CUDA out of memory: {} on {}, where {} of {} are free and PyTorch holds {}".format(
                op, device, *sizes
            )
        ) from error


_seen: dict[int, int] = {}


def _out_of_memory_since_last_asked(device: int) -> bool:
    count = torch.cuda.memory_stats(device).get("num_ooms", 0)
    before, _seen[device] = _seen.get(device, 0), count
    return count > before
