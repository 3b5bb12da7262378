"""Matching pursuit by scores that are kept up to date: s <- s - c G[j], with G the atoms' products.

A program of `_pursue` takes a token through all its steps. Its row of scores lies in scratch memory, of
which the tokens under way keep L2 warm; each step sweeps through it once, which updates it and finds the
best atom. Coefficient and residual come from the residual itself: the scores only choose.

And they choose what exact scores would. Beside them goes a bound on how far they may be off, as a multiple
of the atom's norm. With u = 2^-24, g = (D + 4) u, and r, r' the residual before and after a step:
    the first product                         g |x|
    each step's G, and c times it             |c| |w| (g + u)
    the subtraction's rounding                u (|r'| + the bound)
    that of r' itself, which scores are of    u (|c| |w| + |r'|)
and what underflows, D 2^-149 for every sum of products. Atoms whose score, give or take twice that, may be
the best are scored again from the residual, which has an error g |r'| of its own, and the best of those
wins. Where they are many, or the bound is no more small beside the best score, all are.

Bytes, a token and step: 12 M, which the score's row and G's are. At M = 16384 that is 200 kB, of which 64
come from G and so from HBM, as it is 1 GB; direct would be 25 million operations (D = 768).
Operations: 2 M^2 D once, 2 N M D for the first scores.
"""

import torch
import triton
import triton.language as tl
from fastsparse.kernels._launch import INTERPRETED, OPTIONS
from fastsparse.kernels._order import UNSET, key_at, order_of
from fastsparse.kernels._pursuit import (
    INFINITE,
    LAST,
    Atoms,
    best_of,
    dots,
    goes_on,
    layout,
    length_of,
    orders_of,
    product_error,
    step,
)
from fastsparse.kernels._topk_product import Tile, tiles
from torch import Tensor

SCORES = 2**28  # bytes of scratch memory for scores
BLOCK = 1024  # scores that a program sweeps through at a time
MOST = 32  # atoms that are scored again one by one


@triton.jit
def _product(
    a,
    b,
    out,
    N,
    M,
    D,
    a_row,
    b_row,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """a @ b.T into out (N, M), all fp32: the vendor library's product is as precise only if it is let."""
    blocks = tl.cdiv(N, BLOCK_N)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    row, column = tl.minimum(n, N - 1), tl.minimum(m, M - 1)
    products = dots(a, b, row, column, D, a_row, b_row, BLOCK_N, BLOCK_M, BLOCK_D)
    cells = out + (n.to(tl.int64) * M)[:, None] + m[None, :]
    tl.store(cells, products, mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit
def _sweep(
    scores, inverses, gram, c, index, going, M, NONNEGATIVE: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Take ``c`` times the atom ``index`` from the scores of the rows that go on, and find the best of them.

    Atoms are dealt into BLOCK_M groups, of which each row's (N, BLOCK_M) are returned: the order of the best
    key, that of the second best, and whose the best is. Without a Gram matrix scores stay as they are.
    """
    lane = tl.arange(0, BLOCK_M)
    best = tl.full((going.shape[0], BLOCK_M), UNSET, tl.int32)
    second = best
    whose = tl.zeros((going.shape[0], BLOCK_M), tl.int32)
    for first in range(0, M, BLOCK_M):
        m = first + lane
        inside = going[:, None] & (m < M)[None, :]
        s = tl.load(scores[:, None] + m[None, :], mask=inside, other=0.0)
        if gram is not None:
            products = tl.load(gram + (index.to(tl.int64) * M)[:, None] + m[None, :], mask=inside, other=0.0)
            s -= c[:, None] * products
            tl.store(scores[:, None] + m[None, :], s, mask=inside)
        found = orders_of(s, inverses, tl.minimum(m, M - 1), inside, NONNEGATIVE)
        second = tl.maximum(second, tl.minimum(best, found))
        whose = tl.where(found > best, m[None, :], whose)
        best = tl.maximum(best, found)
    return best, second, whose


@triton.jit
def _rescore(
    r, scores, inverses, matrix, matrix_row, threshold, unsure, columns, M, D,
    NONNEGATIVE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The best of the atoms whose keys reach a threshold, one after the other, by their exact scores."""
    rows: tl.constexpr = unsure.shape[0]
    top = tl.full((rows,), UNSET, tl.int32)
    index = tl.zeros((rows,), tl.int32)
    lane = tl.arange(0, BLOCK_M)
    for first in range(0, M * tl.max(unsure.to(tl.int32), axis=0), BLOCK_M):
        m = tl.broadcast_to((first + lane)[None, :], (rows, BLOCK_M))
        inside = unsure[:, None] & (m < M)
        s = tl.load(scores[:, None] + m, mask=inside, other=0.0)
        found = orders_of(s, inverses, tl.minimum(first + lane, M - 1), inside, NONNEGATIVE)
        next = tl.min(tl.where(inside & (found >= threshold[:, None]), m, LAST), axis=1)
        while tl.min(next, axis=0) < LAST:
            there = next < LAST
            cells = matrix + (next.to(tl.int64) * matrix_row)[:, None] + columns[None, :]
            atom = tl.load(cells, mask=there[:, None] & (columns < D)[None, :], other=0.0)
            key = tl.sum(r * atom, axis=1)
            if not NONNEGATIVE:
                key = tl.abs(key)
            if inverses is not None:
                key *= tl.load(inverses + next, mask=there, other=0.0)
            order = tl.where(there, order_of(key), UNSET)
            index = tl.where(order > top, next, index)
            top = tl.maximum(order, top)
            rest = inside & (found >= threshold[:, None]) & (m > next[:, None])
            next = tl.min(tl.where(rest, m, LAST), axis=1)
    return index


@triton.jit
def _refresh(
    r, scores, inverses, matrix, matrix_row, stale, columns, M, D,
    NONNEGATIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Score all atoms again for the stale rows; the best of them."""
    rows: tl.constexpr = stale.shape[0]
    best = tl.full((rows, BLOCK), UNSET, tl.int32)
    whose = tl.zeros((rows, BLOCK), tl.int32)
    for first in range(0, M * tl.max(stale.to(tl.int32), axis=0), BLOCK):
        m = first + tl.arange(0, BLOCK)
        cells = matrix + (m.to(tl.int64) * matrix_row)[:, None] + columns[None, :]
        atoms = tl.load(cells, mask=(m < M)[:, None] & (columns < D)[None, :], other=0.0)
        s = tl.sum(r[:, None, :] * atoms[None, :, :], axis=2)
        inside = stale[:, None] & (m < M)[None, :]
        tl.store(scores[:, None] + m[None, :], s, mask=inside)
        found = orders_of(s, inverses, tl.minimum(m, M - 1), inside, NONNEGATIVE)
        whose = tl.where(found > best, m[None, :], whose)
        best = tl.maximum(best, found)
    _, index = best_of(best, whose)
    return index


@triton.jit
def _pursue(
    residual,
    scores,
    gram,
    matrix,
    inverses,
    reciprocals,
    factors,
    values,
    indices,
    first,
    tokens,
    k,
    M,
    D,
    matrix_row,
    tol,
    NONNEGATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REFRESHED: tl.constexpr,
    MOST: tl.constexpr,
):
    """All steps of ROWS tokens, from their scores at first."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < tokens
    n = first + row.to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = live[:, None] & (columns < D)[None, :]
    cells = residual + (n * D)[:, None] + columns[None, :]
    r = tl.load(cells, mask=inside, other=0.0)
    scores += row.to(tl.int64) * M
    length = length_of(r)
    unit = 2.0**-24
    g = (D + 4) * unit
    vanished = D * 2.0**-148
    error = product_error(length, D)
    going = live & goes_on(length, tol)
    best, second, whose = _sweep(scores, inverses, None, None, None, going, M, NONNEGATIVE, BLOCK_M)
    for t in range(k):
        if tl.max(going.to(tl.int32), axis=0) > 0:
            top, index = best_of(best, whose)
            key = key_at(top).to(tl.float64)
            slack = 2 * (error + product_error(length, D)) + 8 * unit * tl.abs(key)
            threshold = order_of((key - slack).to(tl.float32))
            reaching = tl.sum((best >= threshold[:, None]).to(tl.int32), axis=1)
            reaching += tl.sum((second >= threshold[:, None]).to(tl.int32), axis=1)
            unsure = going & (top < INFINITE) & (reaching > 1)
            stale = unsure & ((8 * slack > key) | (reaching > MOST))
            unsure = unsure & (stale == 0)
            tl.debug_barrier()  # the program's own stores
            again = _rescore(
                r, scores, inverses, matrix, matrix_row, threshold, unsure, columns, M, D,
                NONNEGATIVE, BLOCK_M,
            )  # fmt: skip
            index = tl.where(unsure, again, index)
            again = _refresh(
                r, scores, inverses, matrix, matrix_row, stale, columns, M, D, NONNEGATIVE, REFRESHED
            )
            index = tl.where(stale, again, index)
            error = tl.where(stale, product_error(length, D), error)
            tl.debug_barrier()
            value, own, r, takes = step(
                r, index, going, matrix, matrix_row, reciprocals, factors, columns, D, NONNEGATIVE
            )
            tl.store(values + n * k + t, value.to(values.dtype.element_ty), mask=takes)
            tl.store(indices + n * k + t, index.to(tl.int64), mask=takes)
            length = length_of(r)
            moved = tl.abs(own).to(tl.float64)
            rounded = unit * (2 * length + error)
            error += 1.25 * (moved * (g + 2 * unit) + rounded + vanished * (1 + moved))
            going = takes & goes_on(length, tol) & (row < tl.where(t + 1 < k, tokens, 0))
            best, second, whose = _sweep(scores, inverses, gram, own, index, going, M, NONNEGATIVE, BLOCK_M)
    tl.store(cells, r, mask=inside)


def pursue(
    residual: Tensor, atoms: Atoms, values: Tensor, indices: Tensor, tol: float, nonnegative: bool
) -> None:
    """Take steps from residual (N, D), fp32, into values and indices (N, k), both zeros."""
    (N, D), M, k = residual.shape, atoms.matrix.shape[0], values.shape[1]
    gram = residual.new_empty(M, M)
    product(atoms.matrix, atoms.matrix, gram)
    most = min(N, max(1, SCORES // (4 * M)))
    scratch = residual.new_empty(most, M)
    blocks = layout(D)
    for first in range(0, N, most):
        tokens = min(most, N - first)
        product(residual[first : first + tokens], atoms.matrix, scratch)
        _pursue[(triton.cdiv(tokens, blocks["ROWS"]),)](
            residual,
            scratch,
            gram,
            atoms.matrix,
            atoms.inverses,
            atoms.reciprocals,
            atoms.factors,
            values,
            indices,
            first,
            tokens,
            k,
            M,
            D,
            atoms.matrix.stride(0),
            tol,
            NONNEGATIVE=nonnegative,
            BLOCK_M=BLOCK,
            MOST=MOST,
            **blocks,
            **OPTIONS,
        )


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a @ b.T, of (N, D) and (M, D) in fp32, into the first rows of out (N, M)."""
    (N, D), M = a.shape, b.shape[0]
    tile = Tile(256, 512, 64, 1, 1) if INTERPRETED else tiles(torch.float32, N)[0]
    _product[(triton.cdiv(N, tile.tokens) * triton.cdiv(M, tile.latents),)](
        a,
        b,
        out,
        N,
        M,
        D,
        a.stride(0),
        b.stride(0),
        BLOCK_N=tile.tokens,
        BLOCK_M=tile.latents,
        BLOCK_D=tile.depth,
        num_warps=tile.warps,
        num_stages=_stages(D, tile),
        **OPTIONS,
    )


def _stages(D: int, tile: Tile) -> int:
    """Rows that aren't aligned come element by element: there are no registers to have more on their way."""
    return tile.stages if D % 4 == 0 else 1
