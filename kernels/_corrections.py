"""What parallel solvers have in common: guesses down the rows of a block, whose columns are channels.

States, derivatives and corrections are tuples of blocks, as _cells.py has them.
"""

import triton
import triton.language as tl
from fastsparse.kernels._scan import product_of_pairs

SMALL = tl.constexpr(2**-18)  # what a state may be off by at most, beside its size or 1: 32 eps
MOST_SPREAD = tl.constexpr(2**12)  # the variance of rounding errors, in units of one's, in what is certified


@triton.jit
def spread(values):
    """Vectors of channels as blocks of one row, to go with every row."""
    found = ()
    for i in tl.static_range(len(values)):
        found += (values[i][None, :],)
    return found


@triton.jit
def shifted(values, first, place):
    """The values of the row before each; of the first row ``first``. ``place`` counts the rows, (., 1)."""
    found = ()
    for i in tl.static_range(len(values)):
        before = tl.broadcast_to(tl.maximum(place - 1, 0), values[i].shape)
        found += (tl.where(place == 0, first[i], tl.gather(values[i], before, 0)),)
    return found


@triton.jit
def last(values, place):
    """The values of the last row, as vectors of channels."""
    found = ()
    for i in tl.static_range(len(values)):
        found += (tl.sum(tl.where(place == place.shape[0] - 1, values[i], 0.0), axis=0),)
    return found


@triton.jit
def difference(a, b):
    found = ()
    for i in tl.static_range(len(a)):
        found += (a[i] - b[i],)
    return found


@triton.jit
def corrected(state, d, where):
    """The states and corrections, added where that is wanted."""
    found = ()
    for i in tl.static_range(len(state)):
        found += (tl.where(where, state[i] + d[i], state[i]),)
    return found


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
    return later_a * a, tl.fma(later_a, d, later_d), tl.fma(later_a * later_a, v, later_v)


@triton.jit
def _join_pairs(
    a, b, c, d, x, y, p, q, r, later_a, later_b, later_c, later_d, later_x, later_y, later_p, later_q, later_r
):
    later = later_a, later_b, later_c, later_d
    P = product_of_pairs(later, (a, b, c, d))
    v = carried_errors(later, (p, q, r))
    return (
        P[0],
        P[1],
        P[2],
        P[3],
        tl.fma(later_a, x, tl.fma(later_b, y, later_x)),
        tl.fma(later_c, x, tl.fma(later_d, y, later_y)),
        v[0] + later_p,
        v[1] + later_q,
        v[2] + later_r,
    )


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
