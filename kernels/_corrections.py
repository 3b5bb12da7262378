"""What parallel solvers have in common: guesses down the rows of a block, whose columns are channels.

States, derivatives and corrections are tuples of blocks, as _cells.py has them.
"""

import triton
import triton.language as tl

SMALL = tl.constexpr(2**-18)  # what a state may be off by at most, beside its size or 1: 32 eps


@triton.jit
def spread(values):
    """Vectors of channels as blocks, to go with every place."""
    found = ()
    for i in tl.static_range(len(values)):
        found += (values[i][None, :],)
    return found


@triton.jit
def shifted(values, first, place):
    """The values of the place before each; of the first place ``first``. ``place`` counts, (places, 1)."""
    found = ()
    for i in tl.static_range(len(values)):
        before = tl.broadcast_to(tl.maximum(place - 1, 0), values[i].shape)
        found += (tl.where(place == 0, first[i], tl.gather(values[i], before, 0)),)
    return found


@triton.jit
def last(values, place):
    """The values of the last place, as vectors of channels."""
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
    """d[i] = J[i] d[i - 1] + missed[i] along the first axis, from zeros, by a scan."""
    return _of_single(J[0], missed[0]) if len(missed) == 1 else _of_pairs(J, missed)


@triton.jit
def _of_single(a, b):
    _, d = tl.associative_scan((a, b), 0, _join)
    return (d,)


@triton.jit
def _of_pairs(a, b):
    found = tl.associative_scan((a[0], a[1], a[2], a[3], b[0], b[1]), 0, _join_pairs)
    return found[4], found[5]


@triton.jit
def _join(a, b, later_a, later_b):
    """Two neighbouring steps x -> a x + b as one."""
    return later_a * a, tl.fma(later_a, b, later_b)


@triton.jit
def _join_pairs(a, b, c, d, x, y, later_a, later_b, later_c, later_d, later_x, later_y):
    """Of pairs, with factors [[a, b], [c, d]] and addends (x, y)."""
    return (
        tl.fma(later_a, a, later_b * c),
        tl.fma(later_a, b, later_b * d),
        tl.fma(later_c, a, later_d * c),
        tl.fma(later_c, b, later_d * d),
        tl.fma(later_a, x, tl.fma(later_b, y, later_x)),
        tl.fma(later_c, x, tl.fma(later_d, y, later_y)),
    )
