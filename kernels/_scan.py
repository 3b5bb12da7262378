"""Linear recurrences down the rows of a tile, by a scan, and what it takes to trust one.

A scan multiplies factors that the recurrence keeps apart: their product may overflow where no state does,
and infinity times zero is NaN. That may be of some rows alone, and the last one be finite; so what goes on
to the next tile is NaN where any row isn't finite, and stays so. The state after a sequence then tells
whether to take its steps again, one by one, as they are defined.
"""

import triton
import triton.language as tl


@triton.jit
def join(a, b, later_a, later_b):
    """Two neighbouring steps h -> a h + b as one."""
    return later_a * a, tl.fma(later_a, b, later_b)


@triton.jit
def product_of_pairs(J, P):
    """Of factors [[0, 1], [2, 3]]."""
    return (
        tl.fma(J[0], P[0], J[1] * P[2]),
        tl.fma(J[0], P[1], J[1] * P[3]),
        tl.fma(J[2], P[0], J[3] * P[2]),
        tl.fma(J[2], P[1], J[3] * P[3]),
    )


@triton.jit
def product(J, P):
    """Factors of one kind or the other, the later times the earlier."""
    return (J[0] * P[0],) if len(P) == 1 else product_of_pairs(J, P)


@triton.jit
def join_pairs(a, b, c, d, x, y, later_a, later_b, later_c, later_d, later_x, later_y):
    """Of pairs, with factors [[a, b], [c, d]] and addends (x, y)."""
    factors = product_of_pairs((later_a, later_b, later_c, later_d), (a, b, c, d))
    return (
        factors[0],
        factors[1],
        factors[2],
        factors[3],
        tl.fma(later_a, x, tl.fma(later_b, y, later_x)),
        tl.fma(later_c, x, tl.fma(later_d, y, later_y)),
    )


@triton.jit
def joined(a, b):
    """The factors and addends of all steps up to each row, as one step. Tuples, as those of :func:`solve`."""
    if len(b) == 1:
        factor, addend = tl.associative_scan((a[0], b[0]), 0, join)
        found = (factor,), (addend,)
    else:
        f, g, p, q, x, y = tl.associative_scan((a[0], a[1], a[2], a[3], b[0], b[1]), 0, join_pairs)
        found = (f, g, p, q), (x, y)
    return found


@triton.jit
def solve(a, b, start):
    """h_t = a_t h_{t-1} + b_t for the rows t of tiles (T, H), from start, vectors of channels.

    Tuples: (a,) and (b,), or of pairs (a00, a01, a10, a11) and (b0, b1); so are start and what is returned.
    """
    f, h = joined(a, b)
    if len(b) == 1:
        states = (tl.fma(f[0], start[0][None, :], h[0]),)
    else:
        x, y = start[0][None, :], start[1][None, :]
        states = tl.fma(f[0], x, tl.fma(f[1], y, h[0])), tl.fma(f[2], x, tl.fma(f[3], y, h[1]))
    return states


@triton.jit
def load(at, mask):
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_factors(a, row, column, mask, other, PAIRS: tl.constexpr):
    """At pointers, as :func:`solve` takes them; where they are masked ``other`` times one, or the identity.

    With the strides of rows and columns exchanged they are transposed.
    """
    first = tl.load(a, mask=mask, other=other).to(tl.float32)
    if PAIRS:
        last = tl.load(a + row + column, mask=mask, other=other).to(tl.float32)
        factors = first, load(a + column, mask), load(a + row, mask), last
    else:
        factors = (first,)
    return factors


@triton.jit
def load_addends(b, row, mask, PAIRS: tl.constexpr):
    if PAIRS:
        addends = load(b, mask), load(b + row, mask)
    else:
        addends = (load(b, mask),)
    return addends


@triton.jit
def times(a, d):
    """Factors times what they are of."""
    if len(d) == 1:
        product = (a[0] * d[0],)
    else:
        product = tl.fma(a[0], d[0], a[1] * d[1]), tl.fma(a[2], d[0], a[3] * d[1])
    return product


@triton.jit
def carried(states, place):
    """Vectors of the last row's states, NaN where any row's isn't finite; ``place`` counts rows, (., 1)."""
    found = ()
    for i in tl.static_range(len(states)):
        if place.shape[0] == 1:  # of a sum of one row Triton 3.6 can't always make code for AMD
            found += (tl.reshape(states[i], (states[i].shape[1],)),)
        else:
            found += (tl.sum(tl.where(place == place.shape[0] - 1, states[i], states[i] * 0), axis=0),)
    return found


@triton.jit
def finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def is_sound(state):
    """Whether states (H,) are finite, all that a channel has."""
    return finite(state[0]) & finite(state[len(state) - 1])
