"""The loop that spmm and spmm_t share: weighted sums of gathered rows, each in the order of its list."""

import triton
import triton.language as tl


@triton.jit
def gather_sum(
    values,
    value_stride,
    rows,
    row_stride,
    counts,
    longest,
    source,
    source_stride,
    columns,
    inside,
    ACCUMULATOR: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """``sum_i values[l][i] * source[rows[l][i], columns]`` over i < counts[l], for a block of lists l.

    ``values`` and ``rows`` point to the lists' first entries, ``longest`` is the largest of ``counts``.
    UNROLL gathers are in flight at a time; a list's additions follow one another in order, whatever the
    block. Past its end a list loads and adds 0; a value of 0 is multiplied as any other: 0 * inf is NaN.
    """
    total = tl.full([counts.shape[0], columns.shape[0]], 0, ACCUMULATOR)
    for first in range(0, longest, UNROLL):
        for step in tl.static_range(UNROLL):
            entry = first + step
            real = entry < counts
            row = tl.load(rows + entry * row_stride, mask=real, other=0).to(tl.int64)
            value = tl.load(values + entry * value_stride, mask=real, other=0).to(ACCUMULATOR)
            cells = source + (row * source_stride)[:, None] + columns[None, :]
            atom = tl.load(cells, mask=real[:, None] & inside[None, :], other=0).to(ACCUMULATOR)
            total += value[:, None] * atom
    return total
