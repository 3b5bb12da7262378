"""Transposed sparse code times dense matrix: ``out[m]`` sums ``values[n, j] * x[n]`` where indices are m.

A stable sort, PyTorch's, brings the code's entries into latent-major order; every latent's list is then
summed in that order. A latent with more than SPLIT entries is hot: its list is cut into pieces of SPLIT,
whose sums go to scratch memory and are added up in order. So nothing is atomic, and every run gives the
same bits.

Nothing waits for the device: grids are sized by what the shapes allow. In a tile of SPLIT sorted entries at
most two pieces begin: one of the latent that is under way when the tile begins, since its pieces are as
long as tiles, and the first one of the latent that is under way when the tile ends. So there are two slots
a tile, and a piece's slot is known without counting the hot latents before it.

Bytes: N k D gathered from ``x``, of which L2 has to hold N x block, and M D written. Scratch memory: about
40 bytes an entry for the sort, and two rows of accumulators a tile, N k D / 32 bytes.
"""

import torch
import triton
import triton.language as tl
from fastsparse.kernels._gather_sum import gather_sum
from fastsparse.kernels._launch import (
    OPTIONS,
    Configuration,
    block_of_rows,
    tuned,
    with_unit_stride,
)
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SPLIT = 256
LIMIT = 2**30  # entries and latents are counted in 32 bits
# Most lists are short, about N k / M entries: few gathers in flight, and wide blocks lest programs be tiny.
CONFIGURATIONS = (Configuration(4, 4), Configuration(2, 4), Configuration(1, 8), Configuration(4, 8))
ENTRIES = 1024  # that a program of _arrange moves


@triton.jit
def _arrange(
    order, values, tokens, coefficients, entries, k, value_token_stride, value_stride, BLOCK: tl.constexpr
):
    """The token and the coefficient of every entry, in the sorted order."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = entry < entries
    position = tl.load(order + entry, mask=real, other=0).to(tl.int32)
    token, slot = position // k, position % k
    cell = values + token.to(tl.int64) * value_token_stride + slot.to(tl.int64) * value_stride
    value = tl.load(cell, mask=real, other=0)
    tl.store(tokens + entry, token, mask=real)
    tl.store(coefficients + entry, value.to(coefficients.dtype.element_ty), mask=real)


@triton.jit
def _list_of(latent, ends, M):
    """A latent's entries [begin, end) in the sorted order; none for one that isn't there."""
    there = (latent >= 0) & (latent < M)
    end = tl.load(ends + latent, mask=there, other=0)
    begin = tl.load(ends + latent - 1, mask=there & (latent > 0), other=0)
    return begin, end


@triton.jit
def _job(job, latents, ends, entries, M, slots, SPLIT: tl.constexpr):
    """What a job sums: the piece in a slot (jobs below ``slots``), or all of a latent that isn't hot.

    Returns the entries [begin, end), the latent, and whether there is anything to do.
    """
    is_piece = job < slots
    tile = job // 2 * SPLIT
    is_first = job % 2 == 1
    last = tl.minimum(tile + SPLIT, entries) - 1
    under_way = tl.load(latents + tl.where(is_first, last, tile), mask=is_piece, other=0).to(tl.int32)
    latent = tl.where(is_piece, under_way, job - slots)
    begin, end = _list_of(latent, ends, M)
    is_hot = end - begin > SPLIT
    # A piece begins a multiple of SPLIT after its list: here the first such place in the tile.
    piece = begin + tl.cdiv(tl.maximum(tile - begin, 0), SPLIT) * SPLIT
    filled = is_hot & ((begin >= tile) == is_first) & (piece < end)
    begin = tl.where(is_piece, piece, begin)
    wanted = tl.where(is_piece, filled, (latent < M) & (is_hot == 0))
    return begin, tl.where(wanted, tl.minimum(begin + SPLIT, end), begin), latent, wanted


@triton.jit
def _sum(
    latents,
    ends,
    tokens,
    coefficients,
    x,
    partials,
    out,
    entries,
    M,
    D,
    slots,
    x_stride,
    SPLIT: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_JOBS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of columns of one job, of several where D is small: pieces first, the longest work there is."""
    blocks = tl.cdiv(slots + M, BLOCK_JOBS)
    program = tl.program_id(0)
    first = program % blocks * BLOCK_JOBS
    job = first + tl.arange(0, BLOCK_JOBS)
    columns = program // blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    begin, end, latent, wanted = _job(job, latents, ends, entries, M, slots, SPLIT)
    total = gather_sum(
        coefficients + begin,
        1,
        tokens + begin,
        1,
        end - begin,
        tl.max(end - begin, axis=0),
        x,
        x_stride,
        columns,
        columns < D,
        coefficients.dtype.element_ty,
        UNROLL,
    )
    inside = wanted[:, None] & (columns < D)[None, :]
    is_piece = (job < slots)[:, None]
    if first < slots:
        cells = partials + (job.to(tl.int64) * D)[:, None] + columns[None, :]
        tl.store(cells, total, mask=inside & is_piece)
    cells = out + (latent.to(tl.int64) * D)[:, None] + columns[None, :]
    tl.store(cells, total.to(out.dtype.element_ty), mask=inside & (is_piece == 0))


@triton.jit
def _join(latents, ends, partials, out, entries, M, D, tiles, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr):
    """The hot latent whose list begins in a tile, if there is one: its pieces' sums, added up in order."""
    program = tl.program_id(0)
    tile = program % tiles
    columns = program // tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    latent = tl.load(latents + tl.minimum((tile + 1) * SPLIT, entries) - 1).to(tl.int32)
    begin, end = _list_of(latent, ends, M)
    if (begin >= tile * SPLIT) & (end - begin > SPLIT):
        slot = partials + tile.to(tl.int64) * 2 * D + columns
        total = tl.load(slot + D, mask=inside, other=0)
        for _ in tl.range(1, tl.cdiv(end - begin, SPLIT), loop_unroll_factor=4):
            slot += 2 * D
            total += tl.load(slot, mask=inside, other=0)
        tl.store(out + latent.to(tl.int64) * D + columns, total.to(out.dtype.element_ty), mask=inside)


def spmm_t(values: Tensor, indices: Tensor, x: Tensor, num_latents: int) -> Tensor:
    """``S.T @ x``: values, indices (N, k); x (N, D); returns (M, D) with M = num_latents."""
    (N, k), M, D, dtype = indices.shape, num_latents, x.shape[1], x.dtype
    entries = N * k
    if entries == 0:
        return x.new_zeros(M, D)
    out = x.new_empty(M, D)
    if out.numel() == 0:
        return out
    if max(entries, M) > LIMIT:
        raise ValueError(
            f"spmm_t: the code must have at most {LIMIT} entries and latents, got {entries} and {M}"
        )
    x = with_unit_stride(x)
    latents, ends, tokens, coefficients = _latent_major(values, indices, M)
    tiles = triton.cdiv(entries, SPLIT) if entries > SPLIT else 0  # else no latent is hot
    partials = coefficients.new_empty(2 * tiles, D)

    def launch(configuration: Configuration) -> None:
        jobs, columns = block_of_rows(D, dtype, configuration.warps)
        _sum[(triton.cdiv(2 * tiles + M, jobs) * triton.cdiv(D, columns),)](
            latents,
            ends,
            tokens,
            coefficients,
            x,
            partials,
            out,
            entries,
            M,
            D,
            2 * tiles,
            x.stride(0),
            SPLIT=SPLIT,
            UNROLL=configuration.unroll,
            BLOCK_JOBS=jobs,
            BLOCK_D=columns,
            num_warps=configuration.warps,
            **OPTIONS,
        )

    tuned(("spmm_t", x.device, dtype, N.bit_length(), k, M, D), CONFIGURATIONS, launch)
    if tiles:
        _, columns = block_of_rows(D, partials.dtype, 1)
        _join[(tiles * triton.cdiv(D, columns),)](
            latents,
            ends,
            partials,
            out,
            entries,
            M,
            D,
            tiles,
            SPLIT=SPLIT,
            BLOCK_D=columns,
            num_warps=1,
            **OPTIONS,
        )
    return out


def _latent_major(values: Tensor, indices: Tensor, M: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The entries sorted by latent: their latents, where each latent's list ends, tokens and coefficients."""
    # The narrower a key, the fewer passes of a radix sort.
    keys = indices.to(torch.int16 if M <= 2**15 else torch.int32)
    latents, order = keys.reshape(-1).sort(stable=True)
    every = torch.arange(M, dtype=keys.dtype, device=keys.device)
    ends = torch.searchsorted(latents, every, right=True, out_int32=True)
    tokens = torch.empty_like(order, dtype=torch.int32)
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    coefficients = torch.empty_like(order, dtype=wide)
    entries, k = order.numel(), indices.shape[1]
    _arrange[(triton.cdiv(entries, ENTRIES),)](
        order,
        values,
        tokens,
        coefficients,
        entries,
        k,
        *values.stride(),
        BLOCK=ENTRIES,
        num_warps=4,
        **OPTIONS,
    )
    return latents, ends, tokens, coefficients
