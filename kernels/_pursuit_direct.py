"""Matching pursuit, a product of residuals and atoms a step: its epilogue keeps every row's best atom.

A program of `_score` takes a tile of tokens through a stripe of the atoms and keeps each token's best key
and atom; `_take` finds the best of the stripes', and takes it from the residual. N x M scores never exist.
A tile of tokens that have all stopped is left out.

Operations: 2 k N M D, in fp32. Bytes: beside the product's, 8 a token and stripe, and 12 D a token, a step.
"""

import torch
import triton
import triton.language as tl
from fastsparse.kernels._launch import OPTIONS, specimen
from fastsparse.kernels._order import UNSET
from fastsparse.kernels._pursuit import (
    LAST,
    Atoms,
    best_of,
    dots,
    goes_on,
    layout,
    length_of,
    orders_of,
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
    index = tl.zeros((BLOCK_N,), tl.int32)
    end = tl.minimum(M, (number + 1) * stripe)
    for first in range(number * stripe, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        row = tl.minimum(n, N - 1)
        column = tl.minimum(m, M - 1)
        scores = dots(residual, matrix, row, column, D, D, matrix_row, BLOCK_N, BLOCK_M, BLOCK_D)
        found = orders_of(scores, inverses, column, (m < end)[None, :], NONNEGATIVE)
        top, at = best_of(found, tl.broadcast_to(m[None, :], (BLOCK_N, BLOCK_M)))
        index = tl.where(top > best, at, index)
        best = tl.maximum(top, best)
    tl.store(orders + number * N + n, best, mask=live)
    tl.store(atoms + number * N + n, index, mask=live)


@triton.jit
def _take(
    residual,
    matrix,
    reciprocals,
    factors,
    going,
    orders,
    atoms,
    values,
    indices,
    N,
    D,
    k,
    t,
    stripes,
    matrix_row,
    tol,
    NONNEGATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
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
    _, index = best_of(
        tl.load(orders + cells, mask=inside, other=UNSET), tl.load(atoms + cells, mask=inside, other=LAST)
    )
    columns = tl.arange(0, BLOCK_D)
    cells = residual + (n.to(tl.int64) * D)[:, None] + columns[None, :]
    inside = live[:, None] & (columns < D)[None, :]
    r = tl.load(cells, mask=inside, other=0.0)
    live = live & goes_on(length_of(r), tol)
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
    best = torch.empty(2, stripes, N, dtype=torch.int32, device=residual.device)
    rows, columns, warps = layout(D)
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
        _take[(triton.cdiv(N, rows),)](
            residual,
            atoms.matrix,
            atoms.reciprocals,
            atoms.factors,
            going,
            *best,
            values,
            indices,
            N,
            D,
            k,
            t,
            stripes,
            atoms.matrix.stride(0),
            tol,
            NONNEGATIVE=nonnegative,
            ROWS=rows,
            BLOCK_D=columns,
            STRIPES=triton.next_power_of_2(stripes),
            num_warps=warps,
            **OPTIONS,
        )


def specimens() -> list[tuple]:
    """The kernels as they run, to be compiled without a GPU."""
    found = []
    pointers = dict.fromkeys(("residual", "matrix"), "*fp32:16")
    pointers |= {"going": "*i8:16", "orders": "*i32:16", "atoms": "*i32:16"}
    norms = {"reciprocals": "*fp64:16", "factors": "*fp32:16"}
    for D, kind in ((768, "i32:16"), (1001, "i32")):
        tile = tiles(torch.float32, 4096)[0]
        sizes = {"N": "i32", "D": kind, "matrix_row": kind}
        constants = {"BLOCK_N": tile.tokens, "BLOCK_M": tile.latents, "BLOCK_D": tile.depth}
        constants |= {"NONNEGATIVE": False, "num_warps": tile.warps, "num_stages": tile.stages}
        scored = pointers | sizes | {"inverses": "*fp32:16", "M": "i32", "stripe": "i32:16"}
        found.append(specimen(f"direct, score, D = {D}", _score, constants, **scored))
    for D, kind in ((768, "i32:16"), (4096, "i32:16"), (1001, "i32")):
        rows, columns, warps = layout(D)
        sizes = {"N": "i32", "D": kind, "matrix_row": kind, "k": "i32", "t": "i32", "stripes": "i32"}
        constants = {
            "NONNEGATIVE": False,
            "ROWS": rows,
            "BLOCK_D": columns,
            "STRIPES": 64,
            "num_warps": warps,
        }
        taken = pointers | sizes | norms | {"values": "*fp32:16", "indices": "*i64:16", "tol": "fp32"}
        found.append(specimen(f"direct, take, D = {D}", _take, constants, **taken))
    return found
