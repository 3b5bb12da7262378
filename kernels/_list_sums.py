"""Sums of listed rows: spmm's lists are the tokens of a ragged code, spmm_t's the entries of every latent.

The entries of all lists lie behind one another, and each list is summed in their order. A list with more than
SPLIT entries is hot: it is cut into pieces of SPLIT, whose sums go to scratch memory and are added up in
order. So nothing is atomic, and every run gives the same bits.

Nothing waits for the device: grids are sized by what the shapes allow. In a tile of SPLIT entries at most two
pieces begin: one of the list that is under way when the tile begins, since its pieces are as long as tiles,
and the first one of the list that is under way when the tile ends. So there are two slots a tile, and a
piece's slot is known without counting the hot lists before it.

Bytes: a row gathered an entry, and one written a list. Scratch memory: two rows of accumulators a tile.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from fastsparse.kernels._gather_sum import gather_sum
from fastsparse.kernels._launch import OPTIONS, Configuration, accumulator, block_of_rows, tuned
from torch import Tensor

SPLIT = 256
LIMIT = 2**30  # entries and lists are counted in 32 bits


def check_counts(op: str, entries: int, lists: int, named: str) -> None:
    """So many entries and lists can be counted."""
    if max(entries, lists) > LIMIT:
        raise ValueError(
            f"{op}: the code must have at most {LIMIT} entries and {named}, got {entries} and {lists}"
        )


@triton.jit
def _range_of(number, bounds, lists):
    """A list's entries [begin, end); none for one that isn't there."""
    there = (number >= 0) & (number < lists)
    begin = tl.load(bounds + number, mask=there, other=0)
    end = tl.load(bounds + number + 1, mask=there, other=0)
    return begin, end


@triton.jit
def _job(job, numbers, bounds, entries, lists, slots, SPLIT: tl.constexpr):
    """What a job sums: the piece in a slot (jobs below ``slots``), or all of a list that isn't hot.

    Returns the entries [begin, end), the list, and whether there is anything to do.
    """
    is_piece = job < slots
    tile = job // 2 * SPLIT
    is_first = job % 2 == 1
    last = tl.minimum(tile + SPLIT, entries) - 1
    under_way = tl.load(numbers + tl.where(is_first, last, tile), mask=is_piece, other=0).to(tl.int32)
    number = tl.where(is_piece, under_way, job - slots)
    begin, end = _range_of(number, bounds, lists)
    is_hot = end - begin > SPLIT
    # A piece begins a multiple of SPLIT after its list: here the first such place in the tile.
    piece = begin + tl.cdiv(tl.maximum(tile - begin, 0), SPLIT) * SPLIT
    filled = is_hot & ((begin >= tile) == is_first) & (piece < end)
    begin = tl.where(is_piece, piece, begin)
    wanted = tl.where(is_piece, filled, (number < lists) & (is_hot == 0))
    return begin, tl.where(wanted, tl.minimum(begin + SPLIT, end), begin), number, wanted


@triton.jit
def _sum(
    numbers,
    bounds,
    places,
    coefficients,
    rows,
    partials,
    out,
    entries,
    lists,
    D,
    slots,
    row_stride,
    ACCUMULATOR: tl.constexpr,
    SPLIT: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_JOBS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of columns of one job, of several where D is small: pieces first, the longest work there is."""
    blocks = tl.cdiv(slots + lists, BLOCK_JOBS)
    program = tl.program_id(0)
    first = program % blocks * BLOCK_JOBS
    job = first + tl.arange(0, BLOCK_JOBS)
    columns = program // blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    begin, end, number, wanted = _job(job, numbers, bounds, entries, lists, slots, SPLIT)
    total = gather_sum(
        coefficients + begin,
        1,
        places + begin,
        1,
        end - begin,
        tl.max(end - begin, axis=0),
        rows,
        row_stride,
        columns,
        columns < D,
        ACCUMULATOR,
        UNROLL,
    )
    inside = wanted[:, None] & (columns < D)[None, :]
    is_piece = (job < slots)[:, None]
    if first < slots:
        cells = partials + (job.to(tl.int64) * D)[:, None] + columns[None, :]
        tl.store(cells, total, mask=inside & is_piece)
    cells = out + (number.to(tl.int64) * D)[:, None] + columns[None, :]
    tl.store(cells, total.to(out.dtype.element_ty), mask=inside & (is_piece == 0))


@triton.jit
def _join(
    numbers, bounds, partials, out, entries, lists, D, tiles, SPLIT: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The hot list that begins in a tile, if there is one: its pieces' sums, added up in order."""
    program = tl.program_id(0)
    tile = program % tiles
    columns = program // tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    number = tl.load(numbers + tl.minimum((tile + 1) * SPLIT, entries) - 1).to(tl.int32)
    begin, end = _range_of(number, bounds, lists)
    if (begin >= tile * SPLIT) & (end - begin > SPLIT):
        slot = partials + tile.to(tl.int64) * 2 * D + columns
        total = tl.load(slot + D, mask=inside, other=0)
        for _ in tl.range(1, tl.cdiv(end - begin, SPLIT), loop_unroll_factor=4):
            slot += 2 * D
            total += tl.load(slot, mask=inside, other=0)
        tl.store(out + number.to(tl.int64) * D + columns, total.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Lists:
    """Lists of rows: each entry's row and coefficient.

    Attributes:
        numbers: (E,) which list every entry is in, ascending; any other number where it is in none.
        bounds: (lists + 1,) int32: entries ``bounds[l]`` up to ``bounds[l + 1]`` are list l's.
        places: (E,) the rows.
        coefficients: (E,).
    """

    numbers: Tensor
    bounds: Tensor
    places: Tensor
    coefficients: Tensor


def sum_lists(
    lists: Lists, rows: Tensor, key: tuple[Hashable, ...], configurations: Sequence[Configuration]
) -> Tensor:
    """(lists, D) sums of rows (_, D) with unit stride, in the configuration that is best for the key."""
    entries, count, D, dtype = lists.places.numel(), lists.bounds.numel() - 1, rows.shape[1], rows.dtype
    out = rows.new_empty(count, D)
    tiles = triton.cdiv(entries, SPLIT) if entries > SPLIT else 0  # else no list is hot
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    partials = rows.new_empty(2 * tiles, D, dtype=wide)

    def launch(configuration: Configuration) -> None:
        jobs, columns = block_of_rows(D, dtype, configuration.warps)
        _sum[(triton.cdiv(2 * tiles + count, jobs) * triton.cdiv(D, columns),)](
            lists.numbers,
            lists.bounds,
            lists.places,
            lists.coefficients,
            rows,
            partials,
            out,
            entries,
            count,
            D,
            2 * tiles,
            rows.stride(0),
            ACCUMULATOR=accumulator(dtype),
            SPLIT=SPLIT,
            UNROLL=configuration.unroll,
            BLOCK_JOBS=jobs,
            BLOCK_D=columns,
            num_warps=configuration.warps,
            **OPTIONS,
        )

    tuned(key, configurations, launch)
    if tiles:
        _, columns = block_of_rows(D, partials.dtype, 1)
        _join[(tiles * triton.cdiv(D, columns),)](
            lists.numbers,
            lists.bounds,
            partials,
            out,
            entries,
            count,
            D,
            tiles,
            SPLIT=SPLIT,
            BLOCK_D=columns,
            num_warps=1,
            **OPTIONS,
        )
    return out
