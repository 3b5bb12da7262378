"""Random rows, read and summed: how fast a gather can be here."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sums(table, order, out, EACH: tl.constexpr, WIDTH: tl.constexpr):
    first, columns = tl.program_id(0) * EACH, tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for i in tl.static_range(EACH):
        total += tl.load(table + tl.load(order + first + i) * WIDTH + columns)
    tl.store(out + tl.program_id(0), tl.sum(total))


def sums(table: Tensor, order: Tensor, each: int, warps: int) -> Tensor:
    """The sum of every ``each`` rows in turn; ``each`` divides their number, the width is a power of two."""
    out = table.new_empty(len(order) // each)
    _sums[(len(out),)](table, order, out, each, table.shape[1], num_warps=warps)
    return out
