"""What parallel solvers have in common: guesses down the rows of a block, whose columns are channels.

States, derivatives and corrections are tuples of blocks, as _cells.py has them.
"""

import triton
import triton.language as tl
from fastsparse.kernels._scan import joined

SMALL = tl.constexpr(2**-18)  # what a state may be off by at most, beside its size or 1: 32 eps
MOST_GROWTH = tl.constexpr(2**13)  # of rounding errors, in what shooting certifies


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
def corrections(J, missed):
    """d[i] = J[i] d[i - 1] + missed[i] down the rows, from zeros, by a scan; NaN where that overflows."""
    _, d = joined(J, missed)
    return d
