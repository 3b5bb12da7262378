"""The scan that finds corrections of guesses, and how far rounding errors spread, and when both certify."""

import triton
import triton.language as tl
from fastsparse.kernels._scan import join, join_pairs

from fastsparse import _options

SMALL = tl.constexpr(_options.SMALL * 2**-23)  # of fp32
MOST_SPREAD = tl.constexpr(_options.MOST_SPREAD)


@triton.jit
def within(d, state):
    """Whether corrections are at rounding level beside their states or 1. NaN is not."""
    found = tl.abs(d[0]) <= SMALL * tl.maximum(tl.abs(state[0]), 1.0)
    if len(d) == 2:
        found = found & (tl.abs(d[1]) <= SMALL * tl.maximum(tl.abs(state[1]), 1.0))
    return found


@triton.jit
def corrections(J, missed, made):
    """d[i] = J[i] d[i - 1] + missed[i] down the rows, from zeros, by a scan; NaN where that overflows.

    Also the covariance of errors, v[i] = J[i] v[i - 1] J[i]^T + made[i]: (v,), or (v00, v01, v11) of pairs.
    """
    if len(missed) == 1:
        _, d, v = tl.associative_scan((J[0], missed[0], made[0]), 0, _join)
        found = (d,), (v,)
    else:
        _, _, _, _, x, y, p, q, r = tl.associative_scan(
            (J[0], J[1], J[2], J[3], missed[0], missed[1], made[0], made[1], made[2]), 0, _join_pairs
        )
        found = (x, y), (p, q, r)
    return found


@triton.jit
def _join(a, d, v, later_a, later_d, later_v):
    a, d = join(a, d, later_a, later_d)
    return a, d, tl.fma(later_a * later_a, v, later_v)


@triton.jit
def _join_pairs(
    a, b, c, d, x, y, p, q, r, later_a, later_b, later_c, later_d, later_x, later_y, later_p, later_q, later_r
):
    d = join_pairs(a, b, c, d, x, y, later_a, later_b, later_c, later_d, later_x, later_y)
    v = carried_errors((later_a, later_b, later_c, later_d), (p, q, r))
    return d[0], d[1], d[2], d[3], d[4], d[5], v[0] + later_p, v[1] + later_q, v[2] + later_r


@triton.jit
def carried_errors(J, v):
    """J v J^T: the covariance v of errors, a step later, or what is done with it in a chunk."""
    if len(J) == 1:
        found = (J[0] * J[0] * v[0],)
    else:
        first, both = tl.fma(J[0], v[0], J[1] * v[1]), tl.fma(J[0], v[1], J[1] * v[2])
        other, second = tl.fma(J[2], v[0], J[3] * v[1]), tl.fma(J[2], v[1], J[3] * v[2])
        found = (
            tl.fma(J[0], first, J[1] * both),
            tl.fma(J[2], first, J[3] * both),
            tl.fma(J[2], other, J[3] * second),
        )
    return found


@triton.jit
def with_one_more(v):
    """The covariance with one error more of each state."""
    return (v[0] + 1,) if len(v) == 1 else (v[0] + 1, v[1], v[2] + 1)


@triton.jit
def trace(v):
    return v[0] if len(v) == 1 else v[0] + v[2]


@triton.jit
def no_errors(state):
    """The covariance of states without errors, as vectors of channels."""
    none = tl.zeros(state[0].shape, tl.float32)
    return (none,) if len(state) == 1 else (none, none, none)


@triton.jit
def most_spread(start):
    """What variances may be at most: errors are beside 1, or what is remembered of a start that is more."""
    return (1 / tl.maximum(start[0] * start[0], 1.0)) * MOST_SPREAD
