"""An encoder's product, whose epilogue filters: of every score one bit, and the scores of the set bits.

Why bits: a product that appends to lists in its epilogue needs atomics whose results it uses, on which
Triton 3.9 aborts, or a prefix sum over the tile, which spills. Packing bits is one reduction along a tile's
rows.

Every tile of a stripe reads x and weight from L2: 2 (1/128 + 1/128) bytes for 2 operations, far below what
L2 gives.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from fastsparse.kernels._launch import INTERPRETED, OPTIONS, chosen
from fastsparse.kernels._order import INFINITE, LARGEST, key_at
from fastsparse.kernels._topk_screen import error_of
from torch import Tensor


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
    floors,
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
    """One tile of a stripe: a bit for every score that its row's or latent's bound lets pass, and these."""
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
    if floors is not None:
        open_n = inside_n
        below = keys <= tl.load(floors + begin + m, mask=inside_m, other=0.0)[None, :]
    else:
        bound = tl.load(bounds + n, mask=inside_n, other=LARGEST)
        open_n = bound != LARGEST
        if token_terms is not None:
            near = tl.load(token_terms + n, mask=inside_n, other=0.0)
            far = tl.load(token_terms + token_stride + n, mask=inside_n, other=0.0)
            norm = tl.load(atom_terms + m, mask=inside_m, other=0.0)
            residual = tl.load(atom_terms + count + m, mask=inside_m, other=0.0)
            rest = tl.load(atom_terms + 2 * count + m, mask=inside_m, other=0.0)
            below = keys + error_of(near, far, norm, residual, rest) < key_at(bound)[:, None]
        else:
            below = keys <= key_at(bound)[:, None]
    passing = open_n[:, None] & inside_m[None, :] & (below == 0)  # NaN passes
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


@dataclass(frozen=True)
class Tokens:
    """A block of tokens: rows of the product's matrix, or those that `rows` lists, from `first` to `live`."""

    matrix: Tensor
    count: int
    terms: Tensor | None = None
    first: int = 0
    rows: Tensor | None = None
    live: Tensor | None = None


@dataclass(frozen=True)
class Atoms:
    """A stripe of latents: rows of the product's matrix, or those that `order` lists."""

    matrix: Tensor
    begin: int
    count: int
    terms: Tensor | None = None
    order: Tensor | None = None


@dataclass(frozen=True)
class Criteria:
    """What scores pass by: keys above their tokens' bounds, which are orders, or their latents' floors."""

    bias: Tensor | None
    scale: Tensor | None
    absolute: bool
    bounds: Tensor | None = None
    floors: Tensor | None = None

    def without_any(self) -> "Criteria":
        """The same, but that nothing finite passes."""
        bounds = None if self.bounds is None else torch.full_like(self.bounds, INFINITE)
        floors = None if self.floors is None else torch.full_like(self.floors, torch.inf)
        return replace(self, bounds=bounds, floors=floors)


def score_stripe(
    op: str,
    tokens: Tokens,
    atoms: Atoms,
    criteria: Criteria,
    live_latents: Tensor | None,
    scratch: tuple[Tensor, Tensor],
) -> None:
    """Launch `score` for a block of tokens and a stripe, into room for scores and a bit for each."""
    D = tokens.matrix.shape[1]

    def launch(tile: Tile, criteria: Criteria = criteria) -> None:
        grid = triton.cdiv(tokens.count, tile.tokens) * triton.cdiv(atoms.count, tile.latents)
        score[(grid,)](
            tokens.matrix,
            atoms.matrix,
            criteria.bias,
            criteria.scale,
            tokens.rows,
            tokens.live,
            tokens.first,
            atoms.order,
            live_latents,
            criteria.bounds,
            criteria.floors,
            tokens.terms,
            0 if tokens.terms is None else tokens.terms.stride(0),
            atoms.terms,
            *scratch,
            tokens.count,
            atoms.begin,
            atoms.count,
            scratch[0].shape[1],
            D,
            *tokens.matrix.stride(),
            *atoms.matrix.stride(),
            ABSOLUTE=criteria.absolute,
            EVEN_D=D % tile.depth == 0,
            UPCAST=INTERPRETED,
            BLOCK_N=tile.tokens,
            BLOCK_M=tile.latents,
            BLOCK_D=tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **OPTIONS,
        )

    dtype = tokens.matrix.dtype
    strides = tokens.matrix.stride(1), atoms.matrix.stride(1) == 1
    screened = tokens.terms is not None
    key = (op, tokens.matrix.device, dtype, D, strides, tokens.count.bit_length(), screened)
    choice = tiles(dtype, tokens.count, D % 64 == 0, screened)
    # Timed where nothing passes, as almost nothing does after the first stripe.
    launch(chosen(key, choice, lambda tile: launch(tile, criteria.without_any())))
