"""What the device could do at best, measured in the same run: copy, matrix products, gathers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.lab import Lab

SAMPLES = 5
ROW_BYTES = 2048  # what one gather reads: a row of D = 1024 in bf16
L2_TABLE, MEMORY_TABLE = 16 << 20, 4 << 30


def measure(lab: Lab) -> dict[str, float]:
    """Bytes or operations a second, by name; a ceiling that could not be measured is left out.

    ``copy`` counts bytes read and written; ``gather_l2`` and ``gather_memory`` the bytes of random rows read
    from a table that fits in the L2 cache and from one that doesn't.
    """
    size = 8192 if not lab.rehearsal else 64
    copied = (2 << 30) if not lab.rehearsal else 1 << 16
    out = {"copy": _copy(lab, copied)}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(size, size, device=lab.device).to(dtype) for _ in range(2))
        into = torch.empty_like(a)
        out[f"product_{name}"] = 2 * size**3 / _best(lab, lambda a=a, b=b, o=into: torch.mm(a, b.T, out=o))
    tables = {"gather_l2": L2_TABLE, "gather_memory": MEMORY_TABLE}
    for name, table in tables.items():
        rate = _gather(lab, table if not lab.rehearsal else 1 << 16)
        if rate is not None:
            out[name] = rate
    return out


def _copy(lab: Lab, size: int) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=lab.device)
    target = torch.empty_like(source)
    return 2 * size / _best(lab, lambda: target.copy_(source))


def _gather(lab: Lab, table_bytes: int) -> float | None:
    """Bytes a second of reading random rows; None where Triton is not there."""
    try:
        from benchmarks.gpu import gather
    except ImportError:
        return None
    width = ROW_BYTES // 4
    rows = 1 << 20 if not lab.rehearsal else 64
    table = torch.ones(table_bytes // ROW_BYTES, width, device=lab.device)
    order = torch.randint(0, len(table), (rows,), device=lab.device)
    tries = [
        _best(lab, lambda each=each, warps=warps: gather.sums(table, order, each, warps))
        for each in (16, 64)
        for warps in (1, 4)
    ]
    return rows * ROW_BYTES / min(tries)


def _best(lab: Lab, run: Callable[[], Any]) -> float:
    run()
    sample = lab.clock(run)
    return min(sample() for _ in range(SAMPLES))


def product(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """The bare ``x @ weight.T``, into memory that is there already."""
    out = x.new_empty(len(x), len(weight))
    return lambda: torch.mm(x, weight.T, out=out)


def gather_floor(ceilings: dict[str, float], gathered: float, moved: float) -> float:
    """The least time of a sparse product.

    Args:
        ceilings: of :func:`measure`.
        gathered: bytes of all rows read, each as often as it is: from the L2 at best.
        moved: bytes that must cross memory once.
    """
    floor = moved / ceilings["copy"]
    return max(floor, gathered / ceilings["gather_l2"]) if "gather_l2" in ceilings else floor
