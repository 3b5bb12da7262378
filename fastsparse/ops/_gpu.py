"""CUDA tensors: which kernel runs an op, and what every kernel needs around it."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from importlib import import_module

import torch

from fastsparse import backend
from fastsparse._validation import check_eligible, check_range
from fastsparse.ops._forms import FORMS

# Fastest first: by the roofline, until a GPU has been measured. The product of topk_encode runs at the vendor
# library's rate in the one and at Triton's in the other. The sparse products move the same bytes in both, and
# C++ launches with less delay, which counts where tokens are few. So far that says the same for every shape.
# An op that isn't here has no kernel: the reference serves.
ORDER = {
    "topk_encode": ("cuda", "triton"),
    "spmm": ("cuda", "triton"),
    "sddmm": ("cuda", "triton"),
    "spmm_t": ("cuda", "triton"),
    "matching_pursuit": ("cuda", "triton"),
    "matching_pursuit_step": ("cuda", "triton"),
    "matching_pursuit_backward": ("cuda", "triton"),
    "linear_recurrence": ("cuda", "triton"),
    "linear_recurrence_backward": ("cuda", "triton"),
    "gru_recurrence": ("cuda", "triton"),
    "lstm_recurrence": ("cuda", "triton"),
    "gru_recurrence_backward": ("cuda", "triton"),
    "lstm_recurrence_backward": ("cuda", "triton"),
}


def implementation(op: str, reference: Callable) -> Callable:
    """What ``fastsparse::<op>`` does with CUDA tensors."""

    def run(*arguments):
        x = arguments[0]
        name = _chosen(op, x.dtype, x.device.index, backend.requested())
        if name == "reference":
            FORMS[op].check(op, arguments)
            return reference(*arguments)
        if op == "topk_encode":
            check_eligible(arguments[1], arguments[3], arguments[6])
        return (_run_cuda if name == "cuda" else _run_triton)(op, arguments)

    return run


def choose(op: str, requested: str | None, failure: Callable[[str], str | None]) -> str:
    """The backend that runs an op, of those without a failure; an error where another one was asked for."""
    if requested is None:
        return next((name for name in ORDER.get(op, ()) if failure(name) is None), "reference")
    if requested == "reference":
        return requested
    if requested == "cpu":
        reason = "it runs on cpu tensors"
    else:
        reason = failure(requested) if requested in ORDER.get(op, ()) else "it has no kernel for this op"
    if reason is not None:
        raise RuntimeError(f"{op}: backend {requested!r} was asked for and can't run here: {reason}")
    return requested


@cache
def _chosen(op: str, dtype: torch.dtype, device: int, requested: str | None) -> str:
    def failure(name: str) -> str | None:
        reason = backend.device_failure(name, device)
        if reason is None and name == "triton" and dtype not in _triton_kernel(op).DTYPES:
            reason = f"Triton's kernel isn't for {str(dtype)[6:]}"
        return reason

    name = choose(op, requested, failure)
    if name == "cuda":
        _out_of_memory_since_last_asked(device)
    return name


@cache
def _triton_kernel(op: str):
    return import_module(f"fastsparse.kernels.{op}")


def _run_triton(op: str, arguments: tuple):
    x = arguments[0]
    _check_tensors(op, arguments)
    with ExitStack() as stack:
        if x.device.index != torch.cuda.current_device():  # Triton launches on the current device
            stack.enter_context(torch.cuda.device(x.device))
        if torch.is_autocast_enabled(
            x.device.type
        ):  # which would take the wrapper's own products down to halves
            stack.enter_context(torch.autocast(x.device.type, enabled=False))
        return getattr(_triton_kernel(op), op)(*arguments)


def _check_tensors(op: str, arguments: tuple) -> None:
    """What Triton's kernels trust. Those in C++ look at their tensors themselves."""
    FORMS[op].check(op, arguments)
    if op == "spmm":
        check_range(op, arguments[1], arguments[2].shape[0])
    elif op == "sddmm":
        check_range(op, arguments[2], arguments[1].shape[0])
    elif op == "spmm_t":
        check_range(op, arguments[1], arguments[3])
    elif op == "matching_pursuit_backward":
        check_range(op, arguments[1], arguments[3].shape[0])


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
