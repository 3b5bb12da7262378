"""What this machine could do at best, measured in the same run, and the least time that work can take.

The roofline model (Williams, Waterman & Patterson 2009, CACM 52(4)): work of F operations on B bytes takes at
least max(F / peak rate, B / peak bandwidth). Both peaks are measured: the best of several matrix products of
the very shape, and a copy of arrays far larger than the caches.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Contender, Timing

PRODUCT = "product"  # how the names of the ceilings begin
COPY_BYTES = 256 << 20
CEILING_SAMPLES = 3


@cache
def copy_bandwidth() -> float:
    """Bytes a second, read and written together, of the fastest of a few copies."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * COPY_BYTES / min(times[1:])


def products(x: Tensor, weight: Tensor) -> list[Contender]:
    """x @ weight.T by every library at hand, in fp32 and bf16: the ceiling for this shape."""
    x16, weight16 = x.bfloat16(), weight.bfloat16()
    calls: dict[str, Callable[[], Tensor]] = {
        f"{PRODUCT} fp32": lambda: F.linear(x, weight),
        f"{PRODUCT} bf16": lambda: F.linear(x16, weight16),
    }
    if torch.backends.mkldnn.is_available() and not weight.is_cuda:
        onednn = torch.ops.mkldnn._linear_pointwise.default
        calls[f"{PRODUCT} fp32, oneDNN"] = lambda: onednn(x, weight, None, "none", [], "")
    return [Contender(name, run, _unchecked, samples=CEILING_SAMPLES) for name, run in calls.items()]


def _unchecked(answer: Tensor) -> str:
    return "a ceiling: torch's own product"


@dataclass(frozen=True)
class Work:
    """What one call must do at least.

    Attributes:
        flops: multiply-adds, times two.
        bytes: what must cross memory once.
        product: the part of ``flops`` that is the measured matrix product.
    """

    flops: float
    bytes: float
    product: float = 0.0


def roofline(work: Work, timing: Timing, timings: dict[str, Timing]) -> dict[str, float]:
    """The floor under ``work`` by the products among ``timings`` and the copy, and the share of it reached.

    The bf16 floor is given too, where a bf16 product was measured: a screen may run in bf16, so a share of
    the fp32 floor above 1 is no mistake.
    """
    moving = work.bytes / copy_bandwidth()
    out = {"flops": work.flops, "bytes": work.bytes}
    median = timing.summary()["median"]
    for dtype in ("fp32", "bf16"):
        best = [
            min(other.seconds)
            for name, other in timings.items()
            if name.startswith(f"{PRODUCT} {dtype}") and other.seconds
        ]
        if best:
            floor = max(min(best), moving)
            out |= {f"floor_{dtype}": floor, f"share_{dtype}": floor / median}
    if len(out) == 2:  # no product in it: bytes alone
        out |= {"floor": moving, "share": moving / median}
    return out
