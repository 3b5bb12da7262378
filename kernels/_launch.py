"""What the launchers of several kernels share."""

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WARP = 64 if torch.version.hip else 32
# Said aloud, because Triton's default is about to change: a product and the sum that it goes into round once.
OPTIONS = {"enable_fp_fusion": True}

T = TypeVar("T")


@dataclass(frozen=True)
class Configuration:
    """How a kernel is laid on the machine: a program's warps, and how many gathers a warp has in flight.

    What is computed doesn't depend on it, bit by bit: every sum has its order from the shapes.
    """

    warps: int
    unroll: int


_chosen: dict[Hashable, object] = {}
timed: dict[Hashable, dict] = {}  # of what was chosen by the clock, all that it said: for benchmarks


def tuned(key: Hashable, configurations: Sequence[T], launch: Callable[[T], None]) -> None:
    """Launch in the configuration that is :func:`chosen`."""
    launch(chosen(key, configurations, launch))


def chosen(key: Hashable, configurations: Sequence[T], launch: Callable[[T], None]) -> T:
    """The configuration that the clock chose for this key: when first asked, all are launched and timed.

    Not while a CUDA graph is captured, which can't wait for a clock: untimed, the first one serves.
    triton.autotune would time even then, and would allocate a buffer of 256 MB to do it.
    """
    best = _chosen.get(key)
    if best is None:
        best = configurations[0]
        if len(configurations) > 1 and not INTERPRETED and not capturing():
            timed[key] = {candidate: _time(launch, candidate) for candidate in configurations}
            best = _chosen[key] = min(timed[key], key=timed[key].get)
    return best


def capturing() -> bool:
    """Whether what is launched goes into a CUDA graph, to run later."""
    return not INTERPRETED and torch.cuda.is_current_stream_capturing()


def _time(launch: Callable[[T], None], configuration: T) -> float:
    """Milliseconds of ten launches, the best of three times."""
    launch(configuration)  # compiles it
    times = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            launch(configuration)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)


def with_unit_stride(tensor: Tensor) -> Tensor:
    """The matrix with its rows contiguous, copied only where they aren't."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] <= 1 else tensor.contiguous()


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The type that sums over a dtype are carried in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def block_of_rows(D: int, dtype: torch.dtype, warps: int) -> tuple[int, int]:
    """Rows and columns of a block: all columns up to a 16-byte access a lane, then rows, up to one a lane."""
    elements = WARP * warps * 16 // dtype.itemsize
    columns = min(triton.next_power_of_2(D), elements)
    rows = min(elements // columns, WARP * warps)
    # The interpreter's time goes by operations, not by elements.
    return 8 * rows if INTERPRETED else rows, columns
