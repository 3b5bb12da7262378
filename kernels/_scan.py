"""Linear recurrences down the rows of a tile, by a scan: of single channels, and of pairs of them."""

import triton
import triton.language as tl


@triton.jit
def _compose(a, b, later_a, later_b):
    return later_a * a, later_a * b + later_b


@triton.jit
def _compose_pairs(a00, a01, a10, a11, b0, b1, c00, c01, c10, c11, d0, d1):
    """The step (c, d) after the step (a, b)."""
    return (
        c00 * a00 + c01 * a10,
        c00 * a01 + c01 * a11,
        c10 * a00 + c11 * a10,
        c10 * a01 + c11 * a11,
        c00 * b0 + c01 * b1 + d0,
        c10 * b0 + c11 * b1 + d1,
    )


@triton.jit
def row_of(tile, row):
    """One row of a tile (T, H): (H,)."""
    return tl.sum(tl.where((tl.arange(0, tile.shape[0]) == row)[:, None], tile, 0.0), axis=0)


@triton.jit
def before(tile, first):
    """A tile's rows (T, H) one further down, the first row (H,) above them."""
    row = tl.arange(0, tile.shape[0])[:, None] + tl.zeros(tile.shape, tl.int32)
    shifted = tl.gather(tile, tl.maximum(row - 1, 0), axis=0)
    return tl.where(row == 0, first[None, :], shifted)


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def scan(a, b, start):
    """h_t = a_t h_{t-1} + b_t for rows t of a, b (T, H), start (H,) being h before them; returns all h.

    A scan multiplies factors that the recurrence keeps apart: their product may overflow where the state
    doesn't, and infinity times zero is NaN. What isn't finite is made step by step, as it is defined.
    """
    factor, h = tl.associative_scan((a, b), 0, _compose)
    h += factor * start[None, :]
    if tl.min(_is_finite(h).to(tl.int32)) == 0:
        state = start
        for row in range(a.shape[0]):
            step = row_of(a, row) * state + row_of(b, row)
            state = row_of(h, row)
            state = tl.where(_is_finite(state), state, step)
            h = tl.where((tl.arange(0, a.shape[0]) == row)[:, None], state[None, :], h)
    return h


@triton.jit
def scan_pairs(a00, a01, a10, a11, b0, b1, start0, start1):
    """h_t[i] = sum_j a_t[i, j] h_{t-1}[j] + b_t[i], as in :func:`scan`; returns h[0] and h[1]."""
    steps = a00, a01, a10, a11, b0, b1
    f00, f01, f10, f11, h0, h1 = tl.associative_scan(steps, 0, _compose_pairs)
    h0 += f00 * start0[None, :] + f01 * start1[None, :]
    h1 += f10 * start0[None, :] + f11 * start1[None, :]
    if tl.min((_is_finite(h0) & _is_finite(h1)).to(tl.int32)) == 0:
        state0, state1 = start0, start1
        for row in range(a00.shape[0]):
            step0 = row_of(a00, row) * state0 + row_of(a01, row) * state1 + row_of(b0, row)
            step1 = row_of(a10, row) * state0 + row_of(a11, row) * state1 + row_of(b1, row)
            state0, state1 = row_of(h0, row), row_of(h1, row)
            state0 = tl.where(_is_finite(state0), state0, step0)
            state1 = tl.where(_is_finite(state1), state1, step1)
            here = (tl.arange(0, a00.shape[0]) == row)[:, None]
            h0 = tl.where(here, state0[None, :], h0)
            h1 = tl.where(here, state1[None, :], h1)
    return h0, h1
