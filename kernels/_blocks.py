"""Tuples of blocks, as states, derivatives and gradients are, whose columns are channels."""

import triton
import triton.language as tl


@triton.jit
def zeros(COUNT: tl.constexpr, SHAPE: tl.constexpr):
    found = ()
    for _ in tl.static_range(COUNT):
        found += (tl.zeros(SHAPE, tl.float32),)
    return found


@triton.jit
def plus(a, b):
    found = ()
    for i in tl.static_range(len(a)):
        found += (a[i] + b[i],)
    return found


@triton.jit
def minus(a, b):
    found = ()
    for i in tl.static_range(len(a)):
        found += (a[i] - b[i],)
    return found


@triton.jit
def where(condition, a, b):
    found = ()
    for i in tl.static_range(len(a)):
        found += (tl.where(condition, a[i], b[i]),)
    return found


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
def totals(values):
    """The sums of all rows, as vectors of channels."""
    found = ()
    for i in tl.static_range(len(values)):
        found += (tl.sum(values[i], axis=0),)
    return found
