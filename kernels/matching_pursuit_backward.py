"""The gradient of matching pursuit: back through the steps of every token, then atom by atom.

With w the atom of a step, c its coefficient, r the residual after it and g what reaches r, from the last
step to the first (fastsparse/reference/matching_pursuit.py derives it; unit norms are s = 1 and r + c w in
dw): ``q = (gc - g.w) / s; dw = q (r - c w) - c g; r <- r + c w; g <- g + q w``.

A program of `_back` carries a token's r and g in registers, the next step's atom on its way. What a step
adds to its atom's gradient goes to a row of scratch memory, which is of bounded size: tokens are taken in
chunks. One stable sort, PyTorch's, before all of them brings each chunk's steps into the order of their
atoms; `_reduce` adds up each atom's rows in that order, `_join` what it has cut into pieces. Nothing is
atomic, and nothing waits for the device.

Bytes: N k D elements of atoms gathered, and as many accumulators written and read again; M D accumulators
of the dictionary's gradient cleared, of which a chunk of tokens reads and writes those it has taken.
"""

import torch
import triton
import triton.language as tl
from fastsparse.kernels._gather_sum import gather_sum
from fastsparse.kernels._launch import (
    INTERPRETED,
    OPTIONS,
    WARP,
    accumulator,
    block_of_rows,
    with_unit_stride,
)
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SCRATCH = 2**26  # bytes of one chunk's rows: about what L2 holds, and enough tokens to fill the machine
TILE = 128  # steps of an atom that one program adds up
UNROLL = 8  # of them in flight


@triton.jit
def _back(
    values,
    indices,
    d_values,
    residual,
    d_residual,
    dictionary,
    inverses,
    d_x,
    contributions,
    first,
    tokens,
    k,
    D,
    value_row,
    value_column,
    index_row,
    index_column,
    d_value_row,
    d_value_column,
    residual_row,
    d_residual_row,
    dictionary_row,
    ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rebuild the residuals of ROWS tokens backwards, and with them what reaches x and each step's atom."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < tokens
    n = first + row.to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = live[:, None] & (columns < D)[None, :]
    cells = (n * residual_row)[:, None] + columns[None, :]
    r = tl.load(residual + cells, mask=inside, other=0).to(ACCUMULATOR)
    if d_residual is not None:
        cells = (n * d_residual_row)[:, None] + columns[None, :]
        g = tl.load(d_residual + cells, mask=inside, other=0).to(ACCUMULATOR)
    else:
        g = tl.zeros_like(r)
    index = tl.load(indices + n * index_row + (k - 1) * index_column, mask=live, other=0)
    atom = tl.load(dictionary + (index * dictionary_row)[:, None] + columns[None, :], mask=inside, other=0)
    for step in range(k):
        t = k - 1 - step
        w = atom.to(ACCUMULATOR)
        more = row < tl.where(t > 0, tokens, 0)
        following = tl.load(indices + n * index_row + (t - 1) * index_column, mask=more, other=0)
        cells = dictionary + (following * dictionary_row)[:, None] + columns[None, :]
        atom = tl.load(cells, mask=more[:, None] & inside, other=0)

        c = tl.load(values + n * value_row + t * value_column, mask=live, other=0).to(ACCUMULATOR)
        taken = c != 0
        q = tl.load(d_values + n * d_value_row + t * d_value_column, mask=taken, other=0).to(ACCUMULATOR)
        q -= tl.sum(g * w, axis=1)
        if inverses is not None:
            inverse = tl.load(inverses + index, mask=taken, other=0)
            q = (q.to(tl.float64) * inverse).to(ACCUMULATOR)
        c, q = c[:, None], q[:, None]
        before = r + c * w
        if contributions is not None:
            r_less_or_more = before if inverses is None else r - c * w
            cells = ((row.to(tl.int64) * k + t) * D)[:, None] + columns[None, :]
            tl.store(contributions + cells, q * r_less_or_more - c * g, mask=inside & taken[:, None])
        r = tl.where(taken[:, None], before, r)
        g = tl.where(taken[:, None], g + q * w, g)
        index = following
    if d_x is not None:
        tl.store(d_x + (n * D)[:, None] + columns[None, :], g.to(d_x.dtype.element_ty), mask=inside)


@triton.jit
def _reduce(
    keys,
    places,
    ones,
    contributions,
    out,
    partials,
    steps,
    base,
    M,
    D,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_JOBS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of columns of one place in the sorted list, of several where D is small.

    There is work where an atom's steps begin, and where they go on past a tile's end: such a piece's sum
    goes to its tile's row of partial sums. Keys from ``base`` + M on are no steps.
    """
    blocks = tl.cdiv(steps, BLOCK_JOBS)
    program = tl.program_id(0)
    place = program % blocks * BLOCK_JOBS + tl.arange(0, BLOCK_JOBS)
    columns = program // blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    real = place < steps
    key = tl.load(keys + place, mask=real, other=-1)
    before = tl.load(keys + place - 1, mask=real & (place > 0), other=-1)
    goes_on = real & (before == key)
    begins = real & (key < base + M) & ((goes_on == 0) | (place % TILE == 0))
    ahead = place[:, None] + tl.arange(0, TILE)[None, :]
    end = tl.minimum(place // TILE * TILE + TILE, steps)
    following = tl.load(keys + ahead, mask=begins[:, None] & (ahead < end[:, None]), other=-1)
    count = tl.sum((following == key[:, None]).to(tl.int32), axis=1)
    total = gather_sum(
        ones + tl.zeros_like(place),
        0,
        places + place,
        1,
        tl.where(begins, count, 0),
        tl.max(tl.where(begins, count, 0), axis=0),
        contributions,
        D,
        columns,
        columns < D,
        contributions.dtype.element_ty,
        UNROLL,
    )
    inside = (columns < D)[None, :]
    cells = partials + ((place // TILE).to(tl.int64) * D)[:, None] + columns[None, :]
    tl.store(cells, total, mask=(begins & goes_on)[:, None] & inside)
    cells = out + ((key - base).to(tl.int64) * D)[:, None] + columns[None, :]
    first = (begins & (goes_on == 0))[:, None] & inside
    tl.store(cells, tl.load(cells, mask=first, other=0) + total, mask=first)


@triton.jit
def _join(keys, partials, out, steps, base, M, D, tiles, TILE: tl.constexpr, BLOCK_D: tl.constexpr):
    """The atom that goes on into a tile, if this is the first that it goes on into: its partial sums."""
    program = tl.program_id(0)
    tile = program % tiles + 1
    columns = program // tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    key = tl.load(keys + tile * TILE)
    goes_on = tl.load(keys + tile * TILE - 1) == key
    earlier = tl.load(keys + (tile - 1) * TILE - 1, mask=tile > 1, other=-1) == key
    if goes_on & (earlier == 0) & (key < base + M):
        total = tl.zeros((BLOCK_D,), out.dtype.element_ty)
        more = goes_on
        while more:
            total += tl.load(partials + tile.to(tl.int64) * D + columns, mask=inside, other=0)
            tile += 1
            more = tl.load(keys + tile * TILE, mask=tile <= tiles, other=-1) == key
        cells = out + (key - base).to(tl.int64) * D + columns
        tl.store(cells, tl.load(cells, mask=inside, other=0) + total, mask=inside)


def matching_pursuit_backward(
    values: Tensor,
    indices: Tensor,
    residual: Tensor,
    dictionary: Tensor,
    d_values: Tensor,
    d_residual: Tensor | None,
    normalized: bool,
    needs_x: bool,
    needs_dictionary: bool,
) -> tuple[Tensor, Tensor]:
    """d_x (N, D) and d_dictionary (M, D); what isn't needed is of shape (0,)."""
    (N, k), (M, D), dtype = values.shape, dictionary.shape, residual.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    d_x = residual.new_empty((N, D) if needs_x else (0,))
    sums = dictionary.new_zeros(M, D, dtype=wide) if needs_dictionary else None
    if N * D > 0 and (needs_x or needs_dictionary):
        residual, dictionary = with_unit_stride(residual), with_unit_stride(dictionary)
        d_residual = None if d_residual is None else with_unit_stride(d_residual)
        inverses = None
        if not normalized:
            inverses = torch.linalg.vector_norm(dictionary, dim=1, dtype=torch.float64).pow(-2)
        tokens, reduce = N, None
        if needs_dictionary and k > 0:
            tokens = min(N, max(1, SCRATCH // (k * D * wide.itemsize)))
            reduce = _Reduction(values, indices, sums, tokens)
        rows, columns, warps = _layout(D)
        for first in range(0, N, tokens):
            count = min(tokens, N - first)
            _back[(triton.cdiv(count, rows),)](
                values,
                indices,
                d_values,
                residual,
                d_residual,
                dictionary,
                inverses,
                d_x if needs_x else None,
                None if reduce is None else reduce.contributions,
                first,
                count,
                k,
                D,
                *values.stride(),
                *indices.stride(),
                *d_values.stride(),
                residual.stride(0),
                0 if d_residual is None else d_residual.stride(0),
                dictionary.stride(0),
                ACCUMULATOR=accumulator(dtype),
                ROWS=rows,
                BLOCK_D=columns,
                num_warps=warps,
                **OPTIONS,
            )
            if reduce is not None:
                reduce(first, count)
    return d_x, dictionary.new_empty(0) if sums is None else sums.to(dtype)


def _layout(D: int) -> tuple[int, int, int]:
    """Tokens, columns and warps of a program of `_back`: all columns, about 16 a lane."""
    columns = triton.next_power_of_2(D)
    warps = min(max(1, columns // (16 * WARP)), 1024 // WARP)
    rows = max(1, min(32, 256 // columns))
    return max(1, min(128, 2**16 // columns)) if INTERPRETED else rows, columns, warps


def _jobs(D: int, dtype: torch.dtype) -> tuple[int, int]:
    """Places and columns of a program of `_reduce`: where there is work lies anywhere, so one place."""
    rows, columns = block_of_rows(D, dtype, 1)
    return rows if INTERPRETED else 1, columns


class _Reduction:
    """Adds the contributions of one chunk of tokens after the other to ``sums`` (M, D)."""

    def __init__(self, values: Tensor, indices: Tensor, sums: Tensor, tokens: int) -> None:
        (N, self.k), (self.M, self.D) = values.shape, sums.shape
        self.sums, self.tokens = sums, tokens
        chunks = torch.arange(N, device=values.device) // tokens
        keys = torch.where(values != 0, indices, self.M) + (chunks * (self.M + 1)).unsqueeze(1)
        if triton.cdiv(N, tokens) * (self.M + 1) < 2**31:  # the narrower a key, the fewer passes of a sort
            keys = keys.to(torch.int32)
        self.keys, order = keys.view(-1).sort(stable=True)
        self.places = (order % (tokens * self.k)).to(torch.int32)  # among the chunk's rows
        self.contributions = sums.new_empty(tokens * self.k, self.D)
        self.partials = sums.new_empty(triton.cdiv(tokens * self.k, TILE), self.D)
        self.ones = sums.new_ones(1)

    def __call__(self, first: int, tokens: int) -> None:
        """Add what the tokens from ``first`` on have contributed."""
        steps, begin = tokens * self.k, first * self.k
        base = first // self.tokens * (self.M + 1)
        keys = self.keys[begin : begin + steps]
        jobs, columns = _jobs(self.D, self.sums.dtype)
        _reduce[(triton.cdiv(steps, jobs) * triton.cdiv(self.D, columns),)](
            keys,
            self.places[begin : begin + steps],
            self.ones,
            self.contributions,
            self.sums,
            self.partials,
            steps,
            base,
            self.M,
            self.D,
            TILE=TILE,
            UNROLL=UNROLL,
            BLOCK_JOBS=jobs,
            BLOCK_D=columns,
            num_warps=1,
            **OPTIONS,
        )
        tiles = (steps - 1) // TILE
        if tiles:
            _join[(tiles * triton.cdiv(self.D, columns),)](
                keys,
                self.partials,
                self.sums,
                steps,
                base,
                self.M,
                self.D,
                tiles,
                TILE=TILE,
                BLOCK_D=columns,
                num_warps=1,
                **OPTIONS,
            )
