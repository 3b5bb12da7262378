"""Matching pursuit, a product of residuals and atoms a step: its epilogue keeps every row's best atom.

A program of `_score` takes a tile of tokens through a stripe of the atoms and keeps each token's best key,
its atom, and the second best key; `_take` finds the best of the stripes', and takes it from the residual.
N x M scores never exist. A tile of tokens that have all stopped is left out.

As in _pursuit_gram.py the scores only choose, and choose what sums of r times the atom would: a product adds
in another order. Stripes whose keys come within both's errors of the best are scored again, the one atom of
those whose second best does not, all atoms of the others.

Operations: 2 k N M D, in fp32. Bytes: beside the product's, 12 a token and stripe, and 12 D a token, a step.
"""

import torch
import triton
import triton.language as tl
from fastsparse.kernels._launch import OPTIONS
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
from fastsparse.kernels._topk_product import tiles
from torch import Tensor

PROGRAMS = 2048  # about as many as fill any machine a few times


@triton.jit
def _score(
    residual,
    matrix,
    inverses,
    going,
    orders,
    seconds,
    atoms,
    N,
    M,
    D,
    stripe,
    matrix_row,
    NONNEGATIVE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The best of one stripe's atoms for every token of a tile."""
    blocks = tl.cdiv(N, BLOCK_N)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    number = tl.program_id(0) // blocks
    live = tl.load(going + n, mask=n < N, other=0) != 0
    if tl.max(live.to(tl.int32), axis=0) == 0:
        return
    best = tl.full((BLOCK_N,), UNSET, tl.int32)
    second = best
    index = tl.zeros((BLOCK_N,), tl.int32)
    end = tl.minimum(M, (number + 1) * stripe)
    for first in range(number * stripe, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        row = tl.minimum(n, N - 1)
        column = tl.minimum(m, M - 1)
        scores = dots(residual, matrix, row, column, D, D, matrix_row, BLOCK_N, BLOCK_M, BLOCK_D)
        found = orders_of(scores, inverses, column, (m < end)[None, :], NONNEGATIVE)
        top, at = best_of(found, tl.broadcast_to(m[None, :], (BLOCK_N, BLOCK_M)))
        next = tl.max(tl.where(m[None, :] == at[:, None], UNSET, found), axis=1)
        second = tl.maximum(tl.maximum(second, next), tl.minimum(best, top))
        index = tl.where(top > best, at, index)
        best = tl.maximum(top, best)
    tl.store(orders + number * N + n, best, mask=live)
    tl.store(seconds + number * N + n, second, mask=live)
    tl.store(atoms + number * N + n, index, mask=live)


@triton.jit
def _rescore(
    r, n, orders, seconds, atoms, threshold, unsure, inverses, matrix, matrix_row, columns, N, M, D,
    stripes, stripe, NONNEGATIVE: tl.constexpr, REFRESHED: tl.constexpr,
):  # fmt: skip
    """The best of the atoms whose keys may reach a threshold, by their own sums."""
    rows: tl.constexpr = unsure.shape[0]
    top = tl.full((rows,), UNSET, tl.int32)
    index = tl.zeros((rows,), tl.int32)
    for number in range(stripes * tl.max(unsure.to(tl.int32), axis=0)):
        kept = number * N + n
        reaches = unsure & (tl.load(orders + kept, mask=unsure, other=UNSET) >= threshold)
        whole = reaches & (tl.load(seconds + kept, mask=unsure, other=UNSET) >= threshold)
        alone = tl.load(atoms + kept, mask=reaches, other=0)
        begin = tl.where(whole, number * stripe, alone)
        end = tl.where(whole, tl.minimum(M, begin + stripe), alone + reaches.to(tl.int32))
        for done in range(0, tl.max(end - begin, axis=0), REFRESHED):
            m = begin[:, None] + done + tl.arange(0, REFRESHED)[None, :]
            inside = m < end[:, None]
            cells = matrix + (m.to(tl.int64) * matrix_row)[:, :, None] + columns[None, None, :]
            scored = tl.load(cells, mask=inside[:, :, None] & (columns < D)[None, None, :], other=0.0)
            keys = tl.sum(r[:, None, :] * scored, axis=2)
            if not NONNEGATIVE:
                keys = tl.abs(keys)
            if inverses is not None:
                keys *= tl.load(inverses + m, mask=inside, other=0.0)
            order, at = best_of(tl.where(inside, order_of(keys), UNSET), m)
            index = tl.where(order > top, at, index)
            top = tl.maximum(order, top)
    return index


@triton.jit
def _take(
    residual,
    matrix,
    inverses,
    reciprocals,
    factors,
    going,
    orders,
    seconds,
    atoms,
    values,
    indices,
    N,
    M,
    D,
    k,
    t,
    stripes,
    stripe,
    matrix_row,
    tol,
    NONNEGATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REFRESHED: tl.constexpr,
    STRIPES: tl.constexpr,
):
    """The step of ROWS tokens."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = tl.load(going + n, mask=n < N, other=0) != 0
    if tl.max(live.to(tl.int32), axis=0) == 0:
        return
    number = tl.arange(0, STRIPES)
    inside = live[:, None] & (number < stripes)[None, :]
    cells = number[None, :] * N + n[:, None]
    best = tl.load(orders + cells, mask=inside, other=UNSET)
    second = tl.load(seconds + cells, mask=inside, other=UNSET)
    top, index = best_of(best, tl.load(atoms + cells, mask=inside, other=LAST))
    columns = tl.arange(0, BLOCK_D)
    cells = residual + (n.to(tl.int64) * D)[:, None] + columns[None, :]
    inside = live[:, None] & (columns < D)[None, :]
    r = tl.load(cells, mask=inside, other=0.0)
    length = length_of(r)
    live = live & goes_on(length, tol)
    key = key_at(top).to(tl.float64)
    threshold = order_of((key - 4 * product_error(length, D) - 2.0**-21 * tl.abs(key)).to(tl.float32))
    reaching = tl.sum((best >= threshold[:, None]).to(tl.int32), axis=1)
    reaching += tl.sum((second >= threshold[:, None]).to(tl.int32), axis=1)
    unsure = live & (top < INFINITE) & (reaching > 1) & (length > 0)
    again = _rescore(
        r, n, orders, seconds, atoms, threshold, unsure, inverses, matrix, matrix_row, columns, N, M, D,
        stripes, stripe, NONNEGATIVE, REFRESHED,
    )  # fmt: skip
    index = tl.where(unsure, again, index)
    value, _, r, takes = step(
        r, index, live, matrix, matrix_row, reciprocals, factors, columns, D, NONNEGATIVE
    )
    tl.store(cells, r, mask=inside)
    slot = n.to(tl.int64) * k + t
    tl.store(values + slot, value.to(values.dtype.element_ty), mask=takes)
    tl.store(indices + slot, index.to(tl.int64), mask=takes)
    tl.store(going + n, takes.to(tl.int8), mask=n < N)


def pursue(
    residual: Tensor, atoms: Atoms, values: Tensor, indices: Tensor, tol: float, nonnegative: bool
) -> None:
    """Take steps from residual (N, D), fp32, into values and indices (N, k), both zeros."""
    (N, D), M, k = residual.shape, atoms.matrix.shape[0], values.shape[1]
    tile = tiles(torch.float32, N)[0]
    blocks, most = triton.cdiv(N, tile.tokens), triton.cdiv(M, tile.latents)
    stripe = triton.cdiv(most, min(most, triton.cdiv(PROGRAMS, blocks))) * tile.latents
    stripes = triton.cdiv(M, stripe)
    going = torch.ones(N, dtype=torch.int8, device=residual.device)
    best = torch.empty(3, stripes, N, dtype=torch.int32, device=residual.device)
    carried = layout(D)
    for t in range(k):
        _score[(blocks * stripes,)](
            residual,
            atoms.matrix,
            atoms.inverses,
            going,
            *best,
            N,
            M,
            D,
            stripe,
            atoms.matrix.stride(0),
            NONNEGATIVE=nonnegative,
            BLOCK_N=tile.tokens,
            BLOCK_M=tile.latents,
            BLOCK_D=tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **OPTIONS,
        )
        _take[(triton.cdiv(N, carried["ROWS"]),)](
            residual,
            atoms.matrix,
            atoms.inverses,
            atoms.reciprocals,
            atoms.factors,
            going,
            *best,
            values,
            indices,
            N,
            M,
            D,
            k,
            t,
            stripes,
            stripe,
            atoms.matrix.stride(0),
            tol,
            NONNEGATIVE=nonnegative,
            STRIPES=triton.next_power_of_2(stripes),
            **carried,
            **OPTIONS,
        )
