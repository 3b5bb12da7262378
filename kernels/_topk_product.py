"""topk_encode's product, whose epilogue filters: of every score one bit, and the scores of the set bits.

Why bits: a product that appends to lists in its epilogue needs atomics whose results it uses, on which
Triton 3.9 aborts, or a prefix sum over the tile, which spills. Packing bits is one reduction along a tile's
rows.

Every tile of a stripe reads x and weight from L2: 2 (1/128 + 1/128) bytes for 2 operations, far below what
L2 gives.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from fastsparse.kernels._launch import INTERPRETED
from fastsparse.kernels._order import LARGEST, key_at
from fastsparse.kernels._topk_screen import error_of


@triton.jit
def score(
    x,
    weight,
    bias,
    scale,
    rows,
    live_rows,
    first_row,
    order,
    live_latents,
    bounds,
    token_terms,
    token_stride,
    atom_terms,
    scores,
    words,
    N,
    begin,
    count,
    width,
    D,
    x_row,
    x_column,
    weight_row,
    weight_column,
    ABSOLUTE: tl.constexpr,
    EVEN_D: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of a stripe: a bit for every score that its row's bound lets pass, and these scores."""
    tiles = tl.cdiv(N, BLOCK_N)  # tokens vary fastest: a wave of tiles shares few atoms
    first_n = tl.program_id(0) % tiles * BLOCK_N
    first_m = tl.program_id(0) // tiles * BLOCK_M
    if live_rows is not None:
        N = tl.minimum(N, tl.load(live_rows) - first_row)
    if live_latents is not None:
        count_live = tl.minimum(count, tl.load(live_latents) - begin)
    else:
        count_live = count
    if (first_n >= N) | (first_m >= count_live):
        return
    n = first_n + tl.arange(0, BLOCK_N)
    m = first_m + tl.arange(0, BLOCK_M)
    # Beyond the last row the last is read again: its scores are dropped below.
    row = tl.minimum(n, N - 1).to(tl.int64)
    if rows is not None:
        row = tl.load(rows + first_row + row)
    latent = tl.minimum(m, count_live - 1).to(tl.int64)
    if order is not None:
        latent = tl.load(order + begin + latent)
    d = tl.arange(0, BLOCK_D)
    a_at = x + row[:, None] * x_row + d[None, :] * x_column
    b_at = weight + latent[None, :] * weight_row + d[:, None] * weight_column
    products = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, D, BLOCK_D):
        if EVEN_D:
            a = tl.load(a_at)
            b = tl.load(b_at)
        else:
            a = tl.load(a_at, mask=(d < D - start)[None, :], other=0.0)
            b = tl.load(b_at, mask=(d < D - start)[:, None], other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        products = tl.dot(a, b, products, input_precision="ieee")
        a_at += BLOCK_D * x_column
        b_at += BLOCK_D * weight_column

    inside_n = n < N
    inside_m = m < count_live
    if bias is not None:
        products += tl.load(bias + begin + m, mask=inside_m, other=0.0)[None, :]
    keys = products
    if scale is not None:
        keys *= tl.load(scale + begin + m, mask=inside_m, other=0.0)[None, :]
    if ABSOLUTE:
        keys = tl.abs(keys)
    bound = tl.load(bounds + n, mask=inside_n, other=LARGEST)
    if token_terms is not None:
        near = tl.load(token_terms + n, mask=inside_n, other=0.0)
        far = tl.load(token_terms + token_stride + n, mask=inside_n, other=0.0)
        norm = tl.load(atom_terms + m, mask=inside_m, other=0.0)
        residual = tl.load(atom_terms + count + m, mask=inside_m, other=0.0)
        rest = tl.load(atom_terms + 2 * count + m, mask=inside_m, other=0.0)
        below = keys + error_of(near, far, norm, residual, rest) < key_at(bound)[:, None]
    else:
        below = keys <= key_at(bound)[:, None]
    passing = (bound != LARGEST)[:, None] & inside_m[None, :] & (below == 0)  # NaN passes
    tl.store(scores + n[:, None] * width + m[None, :], products, mask=passing)
    bits = tl.reshape(passing.to(tl.int32), (BLOCK_N, BLOCK_M // 32, 32)) << tl.arange(0, 32)[None, None, :]
    word = first_m // 32 + tl.arange(0, BLOCK_M // 32)
    tl.store(words + n[:, None] * (width // 32) + word[None, :], tl.sum(bits, axis=2), mask=inside_n[:, None])


@dataclass(frozen=True)
class Tile:
    """How `score` is laid on the machine."""

    tokens: int
    latents: int
    depth: int  # of D, at a time
    warps: int
    stages: int


def tiles(dtype: torch.dtype, tokens: int, even: bool = True, screened: bool = False) -> list[Tile]:
    """The tiles worth trying, the safest first."""
    if INTERPRETED:
        return [Tile(64, 128, 64, 1, 1)]
    if dtype == torch.float32:  # FMAs out of registers
        return [Tile(64, 64, 16, 4, 2)]
    if tokens <= 64:  # a stream of the weight
        return [Tile(max(16, triton.next_power_of_2(tokens)), 64, 64, 4 if tokens <= 32 else 8, 4)]
    if not even:  # masks and addresses take registers
        return [Tile(64, 128, 64, 8, 2)]
    narrow = Tile(128, 64, 64, 8, 3)
    # The brackets take registers, of which the wide one has none left on sm_100.
    return [narrow] if screened else [Tile(128, 128, 64, 8, 3), narrow]
