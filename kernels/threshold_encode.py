"""Encoding by thresholds in Triton: topk_encode's product, a count of what passed, a copy in order.

Latents are scored stripe by stripe. `score` writes of every score one bit, set where it passes, and the
scores of the set bits. Every row of a stripe is cut into parts; `count` counts the bits of each, and
`append` writes its scores behind those of the parts before it. So entries lie block by block and stripe by
stripe, as many as there is room for, in an order that shapes and data alone decide. When all counts are
there, their running sum says where each part belongs in the result, and `move` moves its entries there.
There is no atomic and no sort, and the scores' matrix never exists.

An entry is written, read and written again, 28 bytes; the bits of all scores are N M / 8 bytes, which are
read twice. Both vanish beside the product's 2 N M D operations where few scores pass.

Nothing waits for the device where max_entries says how many entries there is to be room for, but to see
that they were enough; else the host asks once how many there are.
"""

import torch
import triton
import triton.language as tl
from fastsparse.kernels._launch import INTERPRETED, OPTIONS, capturing
from fastsparse.kernels._topk_product import Atoms, Criteria, Tokens, score_stripe
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_MOST_TOKENS = 2048  # scored at a time: 16 tiles, so that a wave of tiles is about square
_LEAST_SCORES, _MOST_SCORES = 2**22, 2**24  # of a stripe
_PART = 4096  # latents of a row that a program takes
_BLOCK = 512  # of them at a time
# Room for entries where nobody says how many there will be: for a 32nd of all scores, within limits. A call
# that needs more is made again, with as much as that.
_SHARE, _LEAST_ROOM, _MOST_ROOM = 32, 2**16, 2**26


@triton.jit
def _part(number, N, live_latents, begin, count, splits):
    """A part's row and place there, and how many of the stripe's latents are real; none, if the row isn't."""
    row, split = number // splits, number % splits
    if live_latents is not None:
        count = tl.maximum(0, tl.minimum(count, tl.load(live_latents) - begin))
    return row, split, tl.where(row < N, count, 0)


@triton.jit
def _set_bits(words):
    """How many bits of every word are set."""
    bits = words.to(tl.uint32, bitcast=True)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["at", "splits", "parts"])
def _count(
    words,
    live_latents,
    sizes,
    counts,
    at,
    N,
    begin,
    count,
    width,
    parts,
    splits,
    LISTS: tl.constexpr,
    PART: tl.constexpr,
):
    """How many scores of each part have passed: of the stripe's in order, and at their places among all."""
    number = tl.program_id(0) * LISTS + tl.arange(0, LISTS)
    row, split, real = _part(number, N, live_latents, begin, count, splits)
    word = (split * (PART // 32))[:, None] + tl.arange(0, PART // 32)[None, :]
    found = tl.load(words + row[:, None] * (width // 32) + word, mask=word * 32 < real[:, None], other=0)
    size = tl.sum(_set_bits(found), axis=1)
    tl.store(sizes + number, size, mask=row < N)
    tl.store(counts + at + row * parts + split, size, mask=row < N)


@triton.jit(do_not_specialize=["capacity", "step", "at", "splits", "parts"])
def _append(
    scores,
    words,
    live_latents,
    sizes,
    starts,
    totals,
    values,
    latents,
    capacity,
    step,
    at,
    N,
    begin,
    count,
    width,
    parts,
    splits,
    LISTS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write what has passed behind the entries that are there before this step, and say how many are then."""
    first = tl.program_id(0) * LISTS
    before = tl.zeros((1024,), tl.int32)
    for start in range(0, first, 1024):
        earlier = start + tl.arange(0, 1024)
        before += tl.load(sizes + earlier, mask=earlier < first, other=0)
    number = first + tl.arange(0, LISTS)
    row, split, real = _part(number, N, live_latents, begin, count, splits)
    size = tl.load(sizes + number, mask=row < N, other=0)
    begins = tl.load(totals + step) + tl.sum(before, axis=0)
    to = begins + tl.cumsum(size, axis=0) - size
    tl.store(starts + at + row * parts + split, to, mask=row < N)
    if first + LISTS >= N * splits:
        tl.store(totals + step + 1, begins + tl.sum(size, axis=0))
    for start in range(0, tl.minimum(PART, tl.max(real - split * PART, axis=0)), BLOCK):
        column = (split * PART + start)[:, None] + tl.arange(0, BLOCK)[None, :]
        inside = column < real[:, None]
        word = tl.load(words + row[:, None] * (width // 32) + column // 32, mask=inside, other=0)
        marked = (word >> (column % 32)) & 1
        added = tl.sum(marked, axis=1)
        if tl.max(added, axis=0) > 0:
            place = to[:, None] + tl.cumsum(marked, axis=1) - 1
            fits = (marked != 0) & (place < capacity)
            score = tl.load(scores + row[:, None] * width + column, mask=fits, other=0.0)
            tl.store(values + place, score, mask=fits)
            tl.store(latents + place, begin + column, mask=fits)
            to += added


@triton.jit(do_not_specialize=["lists", "capacity"])
def _move(
    counts,
    starts,
    ends,
    values,
    latents,
    order,
    values_out,
    indices_out,
    lists,
    capacity,
    LISTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move the parts' entries to where they belong, but nothing where there was no room for all."""
    number = tl.program_id(0).to(tl.int64) * LISTS + tl.arange(0, LISTS)
    size = tl.load(counts + number, mask=number < lists, other=0)
    start = tl.load(starts + number, mask=number < lists, other=0)
    begins = tl.load(ends + number, mask=number < lists, other=0) - size
    if tl.load(ends + lists - 1) <= capacity:
        for first in range(0, tl.max(size, axis=0), BLOCK):
            each = first + tl.arange(0, BLOCK)[None, :]
            real = each < size[:, None]
            value = tl.load(values + start[:, None] + each, mask=real, other=0.0)
            latent = tl.load(latents + start[:, None] + each, mask=real, other=0).to(tl.int64)
            if order is not None:
                latent = tl.load(order + latent, mask=real, other=0)
            tl.store(values_out + begins[:, None] + each, value, mask=real)
            tl.store(indices_out + begins[:, None] + each, latent, mask=real)


class _Encoder:
    """One call: the arguments as kernels want them, and what its steps leave for each other."""

    def __init__(self, x, weight, bias, threshold, absolute, latent_mask) -> None:
        # Kernels count in 32 bits along a tile's columns.
        self.x, self.weight = (
            matrix if matrix.stride(1) < 2**24 else matrix.contiguous() for matrix in (x, weight)
        )
        self.N, self.M = x.shape[0], weight.shape[0]
        self.order = self.live_latents = None  # the eligible latents, in order, and how many they are
        if latent_mask is not None:
            self.order = latent_mask.to(torch.uint8).argsort(descending=True, stable=True)
            self.live_latents = latent_mask.sum(dtype=torch.int32)
        self.criteria = Criteria(self._by_position(bias), None, absolute, floors=self._by_position(threshold))
        self.rows = min(self.N, _MOST_TOKENS)
        area = min(max(self.N * self.M // 32, _LEAST_SCORES), _MOST_SCORES)
        widest = triton.cdiv(self.M, _BLOCK) * _BLOCK
        self.width = min(max(1, area // (self.rows * _PART)) * _PART, widest)
        self.splits = triton.cdiv(self.width, _PART)
        self.parts = triton.cdiv(self.M, self.width) * self.splits
        self.counts = self._whole(self.N, self.parts, dtype=torch.int32)  # of every row's parts
        self.starts = self._whole(self.N, self.parts)

    def _by_position(self, vector: Tensor | None) -> Tensor | None:
        """A vector over the latents in fp32; where only some are eligible, over these."""
        if vector is None:
            return None
        return (vector if self.order is None else vector[self.order]).float().contiguous()

    def _whole(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return self.x.new_empty(shape, dtype=dtype)

    def append(self, room: int) -> None:
        """Keep all entries in the order of finding, or the first ones where there is no room for all."""
        self.values = self.latents = None
        self.values, self.latents = (self._whole(room, dtype=dtype) for dtype in (torch.float32, torch.int32))
        scores = self._whole(self.rows, self.width, dtype=torch.float32)
        words = self._whole(self.rows, self.width // 32, dtype=torch.int32)
        blocks, stripes = triton.cdiv(self.N, self.rows), triton.cdiv(self.M, self.width)
        totals = torch.zeros(blocks * stripes + 1, dtype=torch.int64, device=self.x.device)
        for step in range(blocks * stripes):
            first, begin = step // stripes * self.rows, step % stripes * self.width
            tokens = Tokens(self.x[first : first + self.rows], min(self.rows, self.N - first))
            matrix = self.weight[begin:] if self.order is None else self.weight
            atoms = Atoms(matrix, begin, min(self.width, self.M - begin), None, self.order)
            score_stripe("threshold_encode", tokens, atoms, self.criteria, self.live_latents, (scores, words))
            at = first * self.parts + step % stripes * self.splits
            self._append(tokens.count, atoms, scores, words, totals, step, at)
        self.ends = self.counts.view(-1).cumsum(0)

    def _append(self, tokens: int, atoms: Atoms, scores, words, totals, step: int, at: int) -> None:
        lists = 32 if INTERPRETED else 1
        grid = (triton.cdiv(tokens * self.splits, lists),)
        sizes = self._whole(tokens * self.splits, dtype=torch.int32)
        where = at, tokens, atoms.begin, atoms.count, self.width, self.parts, self.splits
        options = {"LISTS": lists, "PART": _PART, "num_warps": 1, **OPTIONS}
        _count[grid](words, self.live_latents, sizes, self.counts, *where, **options)
        _append[grid](
            scores,
            words,
            self.live_latents,
            sizes,
            self.starts,
            totals,
            self.values,
            self.latents,
            len(self.values),
            step,
            *where,
            BLOCK=_BLOCK,
            **options,
        )

    def total(self) -> int:
        """How many entries there are: this waits for the device."""
        return int(self.ends[-1])

    def arranged(self, entries: int, padded: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The result, of so many entries, zeros behind the last; where there are more, all values are NaN."""
        new = self.x.new_zeros if padded else self.x.new_empty
        values, indices = (new(entries, dtype=dtype) for dtype in (torch.float32, torch.int64))
        lists = 256 if INTERPRETED else 4
        _move[(triton.cdiv(len(self.ends), lists),)](
            self.counts,
            self.starts,
            self.ends,
            self.values,
            self.latents,
            self.order,
            values,
            indices,
            len(self.ends),
            entries,
            LISTS=lists,
            BLOCK=64,
            num_warps=1,
            **OPTIONS,
        )
        if padded:
            values.masked_fill_(self.ends[-1] > entries, torch.nan)
        ends = self.ends.view(self.N, self.parts)[:, -1].clamp(max=entries)
        return values, indices, torch.cat([ends.new_zeros(1), ends])


def threshold_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    absolute: bool,
    latent_mask: Tensor | None,
    max_entries: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, D), weight (M, D), bias and threshold (M,), latent_mask (M,) bool; values, indices, offsets."""
    N, every = x.shape[0], x.shape[0] * weight.shape[0]
    if every == 0:
        kinds = (max_entries or 0, torch.float32), (max_entries or 0, torch.int64), (N + 1, torch.int64)
        return tuple(x.new_zeros(size, dtype=dtype) for size, dtype in kinds)
    encoder = _Encoder(x, weight, bias, threshold, absolute, latent_mask)
    if max_entries is None:
        room = min(every, max(_LEAST_ROOM, min(every // _SHARE, _MOST_ROOM)))
        encoder.append(room)
        entries = encoder.total()
        if entries > room:
            encoder.append(entries)
        return encoder.arranged(entries)
    encoder.append(min(every, max_entries))
    code = encoder.arranged(max_entries, padded=True)
    if not capturing() and (entries := encoder.total()) > max_entries:
        raise RuntimeError(
            f"threshold_encode: max_entries must be at least the number of entries ({entries}), "
            f"got max_entries={max_entries}"
        )
    return code
