"""What matching pursuit's two methods share: atoms to score by, a tile of products, the step itself."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from fastsparse.kernels._launch import INTERPRETED, WARP, with_unit_stride
from fastsparse.kernels._order import UNSET, order_of
from torch import Tensor

LAST = tl.constexpr(2**31 - 1)  # behind every atom
INFINITE = tl.constexpr(0x7F800000)  # the order of infinity


@dataclass(frozen=True)
class Atoms:
    """A dictionary in fp32. Unless its norms are 1 by promise, every atom times a power of two.

    That brings norms into [1/2, 1), so that no product of two atoms overflows or vanishes, and changes no
    other bit.

    Attributes:
        matrix: (M, D), with unit stride.
        inverses: (M,) 1 / norm in fp32, by which scores are compared; 0 of zero atoms, NaN of infinite ones.
        reciprocals: (M,) 1 / squared norm in fp64; infinite for zero atoms, which are never taken.
        factors: (M,) the powers of two in fp32: what the dictionary's coefficients are of these atoms'.
    """

    matrix: Tensor
    inverses: Tensor | None = None
    reciprocals: Tensor | None = None
    factors: Tensor | None = None

    @staticmethod
    def of(dictionary: Tensor, normalized: bool) -> "Atoms":
        if normalized:
            return Atoms(with_unit_stride(dictionary.float()))
        norms = torch.linalg.vector_norm(dictionary, dim=1, dtype=torch.float64)
        exponents = torch.frexp(norms).exponent.clamp(-100, 100)
        exponents = exponents.masked_fill(~(norms.isfinite() & (norms > 0)), 0)
        factors = ((127 - exponents.int()) << 23).view(torch.float32)
        norms = norms * factors
        inverses = norms.reciprocal().masked_fill(norms == 0, 0).masked_fill(norms.isinf(), torch.nan)
        matrix = dictionary.float() * factors.unsqueeze(1)
        return Atoms(matrix.contiguous(), inverses.float(), norms.square().reciprocal(), factors)


def layout(D: int) -> dict:
    """Constants of a program that carries residuals: about 16 columns a thread."""
    columns = triton.next_power_of_2(max(1, D))
    # Columns a thread of atoms that are scored again at a time; fewer where each takes an address, or r many.
    refreshed = 32 if D % 4 == 0 and columns <= 1024 else 16
    return {
        "ROWS": max(1, min(32, 2**16 // columns)) if INTERPRETED else 1,
        "BLOCK_D": columns,
        "REFRESHED": min(64, max(1, refreshed * 256 // columns)),
        "num_warps": min(max(8, columns // (16 * WARP)), 1024 // WARP),
    }


@triton.jit
def dots(
    a,
    b,
    n,
    m,
    D,
    a_row,
    b_row,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows n of one fp32 matrix times rows m of another, (BLOCK_N, BLOCK_M), in full precision."""
    d = tl.arange(0, BLOCK_D)
    a_at = a + (n.to(tl.int64) * a_row)[:, None] + d[None, :]
    b_at = b + (m.to(tl.int64) * b_row)[None, :] + d[:, None]
    products = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, D, BLOCK_D):
        left = tl.load(a_at, mask=(d < D - start)[None, :], other=0.0)
        right = tl.load(b_at, mask=(d < D - start)[:, None], other=0.0)
        products = tl.dot(left, right, products, input_precision="ieee")
        a_at += BLOCK_D
        b_at += BLOCK_D
    return products


@triton.jit
def orders_of(scores, inverses, m, inside, NONNEGATIVE: tl.constexpr):
    """The orders of the keys that the scores (N, M) of atoms m are compared by; unset outside."""
    if NONNEGATIVE:
        keys = scores
    else:
        keys = tl.abs(scores)
    if inverses is not None:
        inverse = tl.load(inverses + m)[None, :]
        keys = tl.where(inverse == 0, 0.0, keys * inverse)  # NaN * 0 would be NaN
    return tl.where(inside, order_of(keys), UNSET)


@triton.jit
def best_of(orders, m):
    """Of every row of orders (N, M) the largest, and the lowest of the atoms m (N, M) that have it."""
    top = tl.max(orders, axis=1)
    return top, tl.min(tl.where(orders == top[:, None], m, LAST), axis=1)


@triton.jit
def step(r, index, going, matrix, matrix_row, reciprocals, factors, columns, D, NONNEGATIVE: tl.constexpr):
    """Take atom ``index`` (N,) from the residuals r (N, D) of the rows that go on.

    Returns the coefficient of the dictionary's atom and of the matrix's own, r after it, and which rows have
    taken a step: where it changes nothing, or isn't positive and has to be, there is none.
    """
    cells = matrix + (index.to(tl.int64) * matrix_row)[:, None] + columns[None, :]
    atom = tl.load(cells, mask=going[:, None] & (columns < D)[None, :], other=0.0)
    value = tl.sum(r * atom, axis=1)
    own = value
    takes = going
    if reciprocals is not None:
        reciprocal = tl.load(reciprocals + index, mask=going, other=1.0)
        factor = tl.load(factors + index, mask=going, other=1.0)
        takes = takes & ((reciprocal == float("inf")) == 0)
        value = (value.to(tl.float64) * reciprocal * factor.to(tl.float64)).to(tl.float32)
        bits = factor.to(tl.int32, bitcast=True)
        own = value * ((254 << 23) - bits).to(tl.float32, bitcast=True)  # divided by the power of two
    if NONNEGATIVE:
        takes = takes & ((value <= 0) == 0)
    else:
        takes = takes & (value != 0)
    return value, own, tl.where(takes[:, None], r - own[:, None] * atom, r), takes


@triton.jit
def product_error(length, D):
    """How far sums of D products of r and an atom may be off, in any order: a multiple of the atom's norm."""
    # Norms are below 1, or 1.1 by a promise half kept; D 2^-149 may underflow, of atoms of norm 1/2 or more.
    return 1.12 * ((D + 4) * 2.0**-24) * length + D * 2.0**-148


@triton.jit
def length_of(r):
    """Norms of rows, in fp64, where the squares of all fp32 numbers fit."""
    wide = r.to(tl.float64)
    return tl.sqrt(tl.sum(wide * wide, axis=1))


@triton.jit
def goes_on(length, tol):
    """Whether a residual of this length is still to be pursued. NaN is."""
    return (tol <= 0) | ((length <= tol) == 0)
