"""What a device could do at best, measured in the same run, and the least time that work can take.

The roofline model (Williams, Waterman & Patterson 2009, CACM 52(4)): work of F operations on B bytes takes at
least max(F / peak rate, B / peak bandwidth). Both peaks are measured: the best of several matrix products of
the very shape, and a copy of arrays far larger than the caches; on a GPU also random rows out of its L2.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Clock, Contender, Timing

PRODUCT = "product"  # how the names of the ceilings begin
CEILING_SAMPLES = 3
SAMPLES = 5
ROW_BYTES = 2048  # what one gather reads: a row of D = 1024 in bf16
L2_TABLE, MEMORY_TABLE = 16 << 20, 4 << 30


@dataclass(frozen=True)
class Work:
    """What one call must do at least.

    Attributes:
        bytes: what must cross memory once.
        flops: multiply-adds, times two.
        product: the part of ``flops`` that is the measured matrix product.
        gathered: bytes of rows that are read as often as they are wanted: from a GPU's L2 at best.
    """

    bytes: float
    flops: float = 0.0
    product: float = 0.0
    gathered: float = 0.0


def measured(device: torch.device, clock: Clock, gpu: bool, quick: bool) -> dict[str, float]:
    """Bytes or operations a second, by name; a ceiling that could not be measured is left out.

    ``copy`` counts bytes read and written; ``gather_l2`` and ``gather_memory`` the bytes of random rows read
    from a table that fits in the L2 cache and from one that doesn't.
    """

    def best(run: Callable[[], Any]) -> float:
        run()
        sample = clock(run)
        return min(sample() for _ in range(SAMPLES))

    size = 1 << 16 if quick else 2 << 30 if gpu else 256 << 20
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    out = {"copy": 2 * size / best(lambda: target.copy_(source))}
    if not gpu:
        return out
    size = 64 if quick else 8192
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        into = torch.empty_like(a)
        out[f"product_{name}"] = 2 * size**3 / best(lambda a=a, b=b, o=into: torch.mm(a, b.T, out=o))
    try:
        from benchmarks import gather
    except ImportError:  # no Triton
        return out
    for name, bytes in (("gather_l2", L2_TABLE), ("gather_memory", MEMORY_TABLE)):
        table = torch.ones((1 << 16 if quick else bytes) // ROW_BYTES, ROW_BYTES // 4, device=device)
        order = torch.randint(0, len(table), (64 if quick else 1 << 20,), device=device)
        tries = [
            best(lambda t=table, o=order, e=each, w=warps: gather.sums(t, o, e, w))
            for each in (16, 64)
            for warps in (1, 4)
        ]
        out[name] = len(order) * ROW_BYTES / min(tries)
    return out


def products(x: Tensor, weight: Tensor) -> list[Contender]:
    """x @ weight.T by every library at hand, in its dtype and in bf16: the ceilings for this shape."""
    half = x.bfloat16(), weight.bfloat16()
    calls: dict[str, Callable[[], Tensor]] = {f"{PRODUCT} bf16": lambda: F.linear(*half)}
    if x.dtype == torch.float32:
        calls[f"{PRODUCT} fp32"] = lambda: F.linear(x, weight)
        if torch.backends.mkldnn.is_available() and not weight.is_cuda:
            onednn = torch.ops.mkldnn._linear_pointwise.default
            calls[f"{PRODUCT} fp32, oneDNN"] = lambda: onednn(x, weight, None, "none", [], "")
    return [Contender(name, run, _unchecked, samples=CEILING_SAMPLES) for name, run in calls.items()]


def _unchecked(answer: Tensor) -> str:
    return "a ceiling: torch's own product"


def roofline(
    work: Work, timing: Timing, timings: Mapping[str, Timing], ceilings: Mapping[str, float]
) -> dict[str, float]:
    """The floor under ``work`` by the products among ``timings`` and the ceilings, and the share reached.

    The bf16 floor is given too, where a bf16 product was measured: a screen may run in bf16, so a share of
    the fp32 floor above 1 is no mistake.
    """
    moving = work.bytes / ceilings["copy"]
    if "gather_l2" in ceilings:
        moving = max(moving, work.gathered / ceilings["gather_l2"])
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
