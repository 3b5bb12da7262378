"""TopK encoding in Triton: a product whose epilogue filters, a collector of survivors, an exact select.

Latents are scored stripe by stripe. `_score` is a matrix product that writes nothing but what it must: of every tile
it stores one bit a score, set where the score may still be among its row's k largest, and the scores of the set bits.
`_collect` reads the bits (1/32 of the scores' bytes), appends the survivors to a bounded list a row, in the order of
their latents, and raises the row's bound to the exact k-th largest key seen. `_select` sorts the lists once, at the
end. So the scores' matrix never exists, no atomic is needed, and every answer is bitwise reproducible.

Why bits: a kernel that ends a product by appending to lists needs atomics whose results it uses, on which Triton 3.9
aborts, or a prefix sum over the tile, which spills. Packing bits is one reduction within a tile's row.

How many scores survive: of a stripe that is a share s of the latents seen with it, about k s a row. Each costs one
32-byte sector; the bits of all N x M scores are N M / 8 bytes. Both vanish beside 2 N M D FLOPs.

A list that fills is compacted: the row's bound rises to the k-th largest key, and what lies below goes, ties by the
lowest latent. k entries remain, so there is always room for one more block. In a screen, where brackets overlap, more
may remain: the row is then given up and, like every such row, done again without a screen; which rows these are stays
on the device.

fp32 is screened in bf16 and refined exactly (the bracket: see `_round`), where that pays; else scored in fp32 FMAs.

The order of every sum is fixed by the shapes and the configuration, which the autotuner chooses once per process and
shape class: one process gives bitwise the same answer every time.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsparse.kernels._launch import INTERPRETED, OPTIONS, tuned, with_unit_stride

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Screening of fp32: by what pays (None), or for tests never (False) or wherever it is possible (True).
screening: bool | None = None

_MOST_TOKENS = 2048  # scored at a time: 16 tiles, so that a wave of tiles is about square
_MOST_SCREENED_TOKENS = 8192  # that share one rounding of the weight
_LEAST_SCORES, _MOST_SCORES = 2**22, 2**24  # of a stripe
_BLOCK = 512  # scores that a row's list takes in at a time
_MOST_K = 1024  # beyond, PyTorch sorts
_MOST_SCREENED_K = 448  # beyond, the lists of a screen grow too long

_UNSET = tl.constexpr(-(2**31))  # below the order of every key
_LARGEST = tl.constexpr(2**31 - 1)  # the order of NaN
_GIVEN_UP = tl.constexpr(-1)  # in place of a count: the screen can't decide this row


# ---- the order of keys ----


@triton.jit
def _order_of(key):
    """Keys as integers of the same order: NaN the largest, both zeros equal."""
    bits = tl.where(key == 0, 0.0, key).to(tl.int32, bitcast=True)
    return tl.where(key != key, _LARGEST, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _key_at(order):
    """The key of an order; NaN for an unset bound, to which no key compares."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _kth_largest(orders, k):
    """Of every row of orders (R, C) the k-th largest, or _UNSET if there are fewer; from its highest bit down."""
    found = tl.where(tl.sum((orders >= 0).to(tl.int32), axis=1) >= k, 0, _UNSET)
    for step in range(31):
        wanted = found + (1 << (30 - step))
        reaching = tl.sum((orders >= wanted[:, None]).to(tl.int32), axis=1)
        found = tl.where(reaching >= k, wanted, found)
    return found


# ---- a screen's terms ----
#
# Error bracket. With x = x~ + dx, w = w~ + dw in bf16 and what it leaves, X = |x~|, W = |w~|, g = (D + 4) 2^-24,
# by Cauchy-Schwarz
#   |x.w - x~.w~|               <= |dx| W + (X + |dx|) |dw|
#   the product's accumulation  <= 2 g X W, since tensor cores cut off where a processor rounds
#   the exact score's own       <= g (X + |dx|) (W + |dw|)
# which sums to A W + B |dw| with A = |dx| (1 + g) + 3 g X and B = (X + |dx|)(1 + g). The bias's rounding is
# relative to it; that of score + bias and of the product with a scale are the 4 in g. Inf and NaN in any of these
# widen the bracket to everything. Squares may underflow: 2^-125 each makes up for it; so small rows stay undecided.


@triton.jit
def _round(
    source,
    order,
    scale,
    bias,
    rounded,
    terms,
    row_stride,
    D,
    padded,
    count,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row in bf16, padded with zeros, and its terms: A, B of a token; W, |dw| and the rest of a latent."""
    position = tl.program_id(0).to(tl.int64)
    row = position
    if order is not None:
        row = tl.load(order + position)
    near = tl.zeros((BLOCK,), tl.float32)
    far = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, padded, BLOCK):
        d = start + tl.arange(0, BLOCK)
        exact = tl.load(source + row * row_stride + d, mask=d < D, other=0.0)
        short = exact.to(tl.bfloat16)
        tl.store(rounded + position * padded + d, short, mask=d < padded)
        kept = short.to(tl.float32)
        near += kept * kept
        far += (exact - kept) * (exact - kept)
    slack = 1.001 + D * 2.0**-23
    norm = tl.sqrt(tl.sum(near, axis=0) + D * 2.0**-125) * slack
    residual = tl.sqrt(tl.sum(far, axis=0) + D * 2.0**-125) * slack
    if TOKENS:
        g = (D + 4) * 2.0**-24
        tl.store(terms + position, 1.001 * (residual * (1 + g) + 3 * g * norm))
        tl.store(terms + count + position, 1.001 * (norm + residual) * (1 + g))
    else:
        rest = D * 2.0**-125
        if bias is not None:
            rest += 2.0**-20 * tl.abs(tl.load(bias + position))
        if scale is not None:
            factor = tl.abs(tl.load(scale + position))
            norm *= factor
            residual *= factor
            rest *= factor
        tl.store(terms + position, norm)
        tl.store(terms + count + position, residual)
        tl.store(terms + 2 * count + position, rest + 2.0**-125)


@triton.jit
def _error(near, far, norm, residual, rest):
    """How far exact keys (N, M) may lie from a screen's, by its terms."""
    return near[:, None] * norm[None, :] + (far[:, None] * residual[None, :] + rest[None, :])


# ---- the product that filters ----


@triton.jit
def _score(
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
    bound = tl.load(bounds + n, mask=inside_n, other=_LARGEST)
    if token_terms is not None:
        near = tl.load(token_terms + n, mask=inside_n, other=0.0)
        far = tl.load(token_terms + token_stride + n, mask=inside_n, other=0.0)
        norm = tl.load(atom_terms + m, mask=inside_m, other=0.0)
        residual = tl.load(atom_terms + count + m, mask=inside_m, other=0.0)
        rest = tl.load(atom_terms + 2 * count + m, mask=inside_m, other=0.0)
        below = keys + _error(near, far, norm, residual, rest) < _key_at(bound)[:, None]
    else:
        below = keys <= _key_at(bound)[:, None]
    passing = (bound != _LARGEST)[:, None] & inside_m[None, :] & (below == 0)  # NaN passes
    tl.store(scores + n[:, None] * width + m[None, :], products, mask=passing)
    bits = tl.reshape(passing.to(tl.int32), (BLOCK_N, BLOCK_M // 32, 32)) << tl.arange(0, 32)[None, None, :]
    word = first_m // 32 + tl.arange(0, BLOCK_M // 32)
    tl.store(words + n[:, None] * (width // 32) + word[None, :], tl.sum(bits, axis=2), mask=inside_n[:, None])


# ---- the lists of survivors ----
#
# A row's list has three columns. Of exact scores: the order of the key, the score's bits, the latent's position among
# the eligible. Of a screen's, the first two are the orders of the key's lower and upper bound.


@triton.jit
def _compact(firsts, seconds, positions, base, held, bound, k, SCREEN: tl.constexpr, CAPACITY: tl.constexpr):
    """Raise the rows' bounds to the k-th largest key and drop what can't be among the k largest; keeps the order."""
    slot = tl.arange(0, CAPACITY)
    real = slot[None, :] < held[:, None]
    at = base[:, None] + slot[None, :]
    tl.debug_barrier()  # the program's own stores
    first = tl.load(firsts + at, mask=real, other=_UNSET)
    second = tl.load(seconds + at, mask=real, other=_UNSET)
    position = tl.load(positions + at, mask=real, other=0)
    tl.debug_barrier()
    bound = tl.maximum(bound, _kth_largest(first, k))
    if SCREEN:
        kept = real & (second >= bound[:, None])
    else:
        above = first > bound[:, None]
        level = real & (first == bound[:, None])
        room = k - tl.sum(above.to(tl.int32), axis=1)
        kept = above | (level & (tl.cumsum(level.to(tl.int32), axis=1) <= room[:, None]))
    to = base[:, None] + tl.cumsum(kept.to(tl.int32), axis=1) - 1
    tl.store(firsts + to, first, mask=kept)
    tl.store(seconds + to, second, mask=kept)
    tl.store(positions + to, position, mask=kept)
    tl.debug_barrier()
    return tl.where(held >= 0, tl.sum(kept.to(tl.int32), axis=1), held), bound


@triton.jit
def _entries(
    scores, width, scale, near, far, atom_terms, count, row, column, marked, begin, ABSOLUTE: tl.constexpr
):
    """The first two columns of the marked scores' entries."""
    score = tl.load(scores + row[:, None] * width + column[None, :], mask=marked, other=0.0)
    inside = column < count
    key = score
    if scale is not None:
        key *= tl.load(scale + begin + column, mask=inside, other=0.0)[None, :]
    if ABSOLUTE:
        key = tl.abs(key)
    if atom_terms is not None:
        norm = tl.load(atom_terms + column, mask=inside, other=0.0)
        residual = tl.load(atom_terms + count + column, mask=inside, other=0.0)
        rest = tl.load(atom_terms + 2 * count + column, mask=inside, other=0.0)
        error = _error(near, far, norm, residual, rest)
        lower = key - error
        first = _order_of(tl.where(lower == lower, lower, float("-inf")))
        second = _order_of(key + error)
    else:
        first = _order_of(key)
        second = score.to(tl.int32, bitcast=True)
    return first, second


@triton.jit
def _passing(first, second, bound, SCREEN: tl.constexpr):
    """Which entries a bound lets pass: of exact keys, equal ones lose to the lower latents before them."""
    if SCREEN:
        passing = second >= bound[:, None]
    else:
        passing = first > bound[:, None]
    return passing


@triton.jit
def _collect(
    scores,
    words,
    scale,
    live_rows,
    first_row,
    live_latents,
    token_terms,
    token_stride,
    atom_terms,
    firsts,
    seconds,
    positions,
    counts,
    bounds,
    N,
    begin,
    count,
    width,
    M,
    k,
    ABSOLUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Append a stripe's survivors to the lists of ROWS rows."""
    SCREEN: tl.constexpr = token_terms is not None
    if live_rows is not None:
        N = tl.minimum(N, tl.load(live_rows) - first_row)
    if live_latents is not None:
        count_live = tl.minimum(count, tl.load(live_latents) - begin)
    else:
        count_live = count
    if tl.program_id(0) * ROWS >= N:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < N
    held = tl.load(counts + row, mask=live, other=_GIVEN_UP)
    bound = tl.load(bounds + row, mask=live, other=_LARGEST)
    near, far = held, held
    if SCREEN:
        near = tl.load(token_terms + row, mask=live, other=0.0)
        far = tl.load(token_terms + token_stride + row, mask=live, other=0.0)
    base = row * CAPACITY
    lane = tl.arange(0, BLOCK)

    if (begin == 0) & (count_live >= 2 * BLOCK) & (2 * k <= BLOCK):
        # A first bound: with the stripe's latents dealt into BLOCK groups, the k-th largest of the groups' maxima.
        maxima = tl.full((ROWS, BLOCK), _UNSET, tl.int32)
        for start in range(0, count_live, BLOCK):
            column = start + lane
            marked = live[:, None] & (column < count_live)[None, :]
            lower, _ = _entries(
                scores, width, scale, near, far, atom_terms, count, row, column, marked, begin, ABSOLUTE
            )
            maxima = tl.maximum(maxima, tl.where(marked, lower, _UNSET))
        # One less, since of exact keys only those above a bound pass.
        first_bound = _kth_largest(maxima, k) - (0 if SCREEN else 1)
        bound = tl.where(live, first_bound, bound)

    for start in range(0, count_live, BLOCK):
        column = start + lane
        inside = (live & (held >= 0))[:, None] & (column < count_live)[None, :]
        word = tl.load(words + row[:, None] * (width // 32) + (column // 32)[None, :], mask=inside, other=0)
        marked = ((word >> (column % 32)[None, :]) & 1) != 0
        if tl.max(tl.max(marked.to(tl.int32), axis=1), axis=0) > 0:
            first, second = _entries(
                scores, width, scale, near, far, atom_terms, count, row, column, marked, begin, ABSOLUTE
            )
            passing = marked & _passing(first, second, bound, SCREEN)
            added = tl.sum(passing.to(tl.int32), axis=1)
            if tl.max(held + added, axis=0) > CAPACITY:
                held, bound = _compact(firsts, seconds, positions, base, held, bound, k, SCREEN, CAPACITY)
                passing = marked & _passing(first, second, bound, SCREEN)
                added = tl.sum(passing.to(tl.int32), axis=1)
                if SCREEN:
                    fits = held + added <= CAPACITY
                    held = tl.where(fits, held, _GIVEN_UP)
                    bound = tl.where(fits, bound, _LARGEST)
                    passing = passing & fits[:, None]
                    added = tl.where(fits, added, 0)
            at = base[:, None] + held[:, None] + tl.cumsum(passing.to(tl.int32), axis=1) - 1
            tl.store(firsts + at, first, mask=passing)
            tl.store(seconds + at, second, mask=passing)
            tl.store(positions + at, tl.broadcast_to((begin + column)[None, :], (ROWS, BLOCK)), mask=passing)
            held += added

    # The k-th best of twice as many latents is a bound worth the work of finding it. In the end a screen's lists must
    # hold only what can still win.
    stripe = begin // width
    if ((stripe & (stripe - 1)) == 0) | (SCREEN & (begin + count == M)):
        held, bound = _compact(firsts, seconds, positions, base, held, bound, k, SCREEN, CAPACITY)
    tl.store(counts + row, held, mask=live)
    tl.store(bounds + row, bound, mask=live)


# ---- exact scores of a screen's survivors ----


@triton.jit
def _refine(
    x,
    weight,
    bias,
    scale,
    order,
    firsts,
    seconds,
    positions,
    counts,
    D,
    x_row,
    weight_row,
    ABSOLUTE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Exact keys and scores of a row's candidates, in place of their bounds; SPLIT programs share a row."""
    row = tl.program_id(0) // SPLIT
    held = tl.load(counts + row)
    d = tl.arange(0, BLOCK_D)
    for start in range(tl.program_id(0) % SPLIT * BLOCK_K, held, SPLIT * BLOCK_K):
        slot = start + tl.arange(0, BLOCK_K)
        real = slot < held
        position = tl.load(positions + row * CAPACITY + slot, mask=real, other=0)
        latent = position.to(tl.int64)
        if order is not None:
            latent = tl.load(order + position, mask=real, other=0)
        sums = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        for done in range(0, D, BLOCK_D):
            inside = d < D - done
            token = tl.load(x + row.to(tl.int64) * x_row + done + d, mask=inside, other=0.0)
            atoms = weight + latent[:, None] * weight_row + (done + d)[None, :]
            sums += token[None, :] * tl.load(atoms, mask=real[:, None] & inside[None, :], other=0.0)
        score = tl.sum(sums, axis=1)
        if bias is not None:
            score += tl.load(bias + position, mask=real, other=0.0)
        key = score
        if scale is not None:
            key *= tl.load(scale + position, mask=real, other=0.0)
        if ABSOLUTE:
            key = tl.abs(key)
        tl.store(firsts + row * CAPACITY + slot, _order_of(key), mask=real)
        tl.store(seconds + row * CAPACITY + slot, score.to(tl.int32, bitcast=True), mask=real)


# ---- the k best, in order ----


@triton.jit
def _select(
    firsts,
    seconds,
    positions,
    counts,
    order,
    rows,
    live_rows,
    first_row,
    values,
    indices,
    N,
    k,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    CAPACITY: tl.constexpr,
    SELECTED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Cut the lists of ROWS rows down to the k best; write each to its rank, found by counting who is better."""
    if live_rows is not None:
        N = tl.minimum(N, tl.load(live_rows) - first_row)
    if tl.program_id(0) * ROWS >= N:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < N
    held = tl.load(counts + row, mask=live, other=_GIVEN_UP)
    base = row * CAPACITY
    unset = tl.full((ROWS,), _UNSET, tl.int32)
    held, _ = _compact(firsts, seconds, positions, base, held, unset, k, False, CAPACITY)

    slot = tl.arange(0, SELECTED)
    real = slot[None, :] < held[:, None]
    at = base[:, None] + slot[None, :]
    key = tl.load(firsts + at, mask=real, other=_UNSET)
    rank = tl.zeros((ROWS, SELECTED), tl.int32)
    for start in range(0, SELECTED, CHUNK):
        rival = start + tl.arange(0, CHUNK)
        rivals = tl.load(
            firsts + base[:, None] + rival[None, :], mask=rival[None, :] < held[:, None], other=_UNSET
        )
        ahead = (rivals[:, None, :] == key[:, :, None]) & (rival[None, None, :] < slot[None, :, None])
        ahead = (rivals[:, None, :] > key[:, :, None]) | ahead  # a list is in the order of its latents
        rank += tl.sum(ahead.to(tl.int32), axis=2)

    score = tl.load(seconds + at, mask=real, other=0).to(tl.float32, bitcast=True)
    if RELU:
        score = tl.where(score <= 0, 0.0, score)
    latent = tl.load(positions + at, mask=real, other=0).to(tl.int64)
    if order is not None:
        latent = tl.load(order + latent, mask=real, other=0)
    out = (first_row + row).to(tl.int64)
    if rows is not None:
        out = tl.load(rows + first_row + row, mask=live, other=0)
    # Slots behind a list of fewer than k rank behind it.
    wanted = (slot < k)[None, :] & (held >= 0)[:, None]
    tl.store(values + out[:, None] * k + rank, score.to(values.dtype.element_ty), mask=wanted)
    tl.store(indices + out[:, None] * k + rank, latent, mask=wanted)


# ---- one call ----


@dataclass(frozen=True)
class Tile:
    """How `_score` is laid on the machine."""

    tokens: int
    latents: int
    depth: int  # of D, at a time
    warps: int
    stages: int


def tiles(dtype: torch.dtype, tokens: int) -> list[Tile]:
    """The tiles worth trying, the safest first."""
    if INTERPRETED:
        return [Tile(64, 128, 64, 1, 1)]
    if dtype == torch.float32:  # FMAs out of registers
        return [Tile(64, 64, 16, 4, 2)]
    if tokens <= 64:  # a stream of the weight
        return [Tile(max(16, triton.next_power_of_2(tokens)), 64, 128, 4, 3)]
    return [Tile(128, 128, 64, 8, 3)]


@dataclass(frozen=True)
class _Tokens:
    """A block of tokens: the matrix that the product takes, its rows, or of `rows` from `first` those before `live`."""

    matrix: Tensor
    count: int
    terms: Tensor | None = None
    first: int = 0
    rows: Tensor | None = None
    live: Tensor | None = None


@dataclass(frozen=True)
class _Atoms:
    """A stripe of latents: the matrix that the product takes, whose rows are those, or `order` lists them."""

    matrix: Tensor
    begin: int
    count: int
    terms: Tensor | None = None
    order: Tensor | None = None


class _Lists:
    """The lists of some tokens: three columns, how much they hold, and the rows' bounds."""

    def __init__(self, tokens: int, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.columns = torch.empty(3, tokens, capacity, dtype=torch.int32, device=device)
        self.counts = torch.zeros(tokens, dtype=torch.int32, device=device)
        self.bounds = torch.full((tokens,), _UNSET.value, dtype=torch.int32, device=device)

    def options(self) -> dict:
        """Of a kernel that works on lists: several rows a program where programs run one after another."""
        rows = 16 if INTERPRETED else 1
        return {"ROWS": rows, "CAPACITY": self.capacity, "num_warps": min(8, self.capacity // 512), **OPTIONS}


class _Encoder:
    """One call: the arguments as kernels want them, and the ways to serve a block of tokens."""

    def __init__(self, x, weight, bias, k, activation, latent_scale, latent_mask) -> None:
        self.x, self.weight, self.k = x, weight, k
        (self.N, self.D), self.M = x.shape, weight.shape[0]
        self.absolute, self.relu = activation == "abs", activation == "relu"
        self.mask = latent_mask
        self.order = self.live_latents = None  # the eligible latents, in order, and how many they are
        if latent_mask is not None and k <= _MOST_K:
            self.order = latent_mask.to(torch.uint8).argsort(descending=True, stable=True)
            self.live_latents = latent_mask.sum(dtype=torch.int32)
        self.bias, self.scale = self._by_position(bias), self._by_position(latent_scale)
        # Triton's interpreter cuts off where it should round to bf16.
        self.values = x.new_empty(self.N, k, dtype=torch.float32 if INTERPRETED else x.dtype)
        self.indices = x.new_empty(self.N, k, dtype=torch.int64)

    def _by_position(self, vector: Tensor | None) -> Tensor | None:
        """A vector over the latents in fp32; where only some are eligible, over these."""
        if vector is None:
            return None
        return (vector if self.order is None else vector[self.order]).float().contiguous()

    def run(self) -> tuple[Tensor, Tensor]:
        if self.N == 0:
            return self.x.new_empty(0, self.k), self.indices
        if self.k > _MOST_K:
            self._sort_scores()
        elif self._screens():
            self._plain(*self._screen())
        else:
            self._plain()
        return self.values.to(self.x.dtype), self.indices

    def _screens(self) -> bool:
        possible = self.x.dtype == torch.float32 and self.D > 0 and self.k <= _MOST_SCREENED_K
        if screening is not None or not possible:
            return possible and bool(screening)
        # Enough tokens must share the rounding of the weight; a large k leaves little to drop.
        return self.N >= 64 and self.D >= 64 and self.M >= 4096 and 64 * self.k <= self.M

    def _scratch(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Room for the scores of a stripe, N M / 32 within limits, and a bit for each."""
        area = min(max(self.N * self.M // 32, _LEAST_SCORES), _MOST_SCORES)
        blocks = min(area // (tokens * _BLOCK), triton.cdiv(self.M, _BLOCK))
        return self._scores(tokens, max(1, blocks) * _BLOCK)

    def _scores(self, tokens: int, width: int) -> tuple[Tensor, Tensor]:
        scores = self.x.new_empty(tokens, width, dtype=torch.float32)
        return scores, self.x.new_empty(tokens, width // 32, dtype=torch.int32)

    def _plain(self, rows: Tensor | None = None, live: Tensor | None = None) -> None:
        """Encode all tokens, or of `rows` those before `live`, by exact scores."""
        capacity = triton.next_power_of_2(self.k + _BLOCK)
        for first in range(0, self.N, _MOST_TOKENS):
            count = min(_MOST_TOKENS, self.N - first)
            matrix = self.x[first : first + count] if rows is None else self.x
            tokens = _Tokens(matrix, count, None, first, rows, live)
            lists = _Lists(count, capacity, self.x.device)
            scratch = self._scratch(count)
            width = scratch[0].shape[1]
            for begin in range(0, self.M, width):
                matrix = self.weight[begin:] if self.order is None else self.weight
                atoms = _Atoms(matrix, begin, min(width, self.M - begin), None, self.order)
                self._score(tokens, atoms, scratch, lists.bounds)
                self._collect(tokens, atoms, scratch, lists, slice(count))
            self._select(tokens, lists)

    def _screen(self) -> tuple[Tensor, Tensor]:
        """Encode all tokens by screen, certify and refine; returns the undecided ones first, and their number."""
        x, weight = with_unit_stride(self.x), with_unit_stride(self.weight)
        capacity = triton.next_power_of_2(8 * self.k + _BLOCK)
        # The lists too shall be N M / 32 numbers.
        most = min(self.N * self.M // (32 * 3 * capacity), _MOST_SCREENED_TOKENS)
        most = max(1, most // _MOST_TOKENS) * _MOST_TOKENS
        undecided = []
        for first in range(0, self.N, most):
            count = min(most, self.N - first)
            exact = _Tokens(x[first : first + count], count, None, first)
            lists = _Lists(count, capacity, x.device)
            scratch = self._scratch(min(count, _MOST_TOKENS))
            width = scratch[0].shape[1]
            short, terms = self._round(exact.matrix, count)
            for begin in range(0, self.M, width):
                matrix = weight[begin:] if self.order is None else weight
                atoms = _Atoms(matrix, begin, min(width, self.M - begin))
                rounded, atom_terms = self._round(matrix, atoms.count, atoms)
                atoms = replace(atoms, matrix=rounded, terms=atom_terms)
                for start in range(0, count, _MOST_TOKENS):
                    block = slice(start, min(start + _MOST_TOKENS, count))
                    tokens = _Tokens(short[block], block.stop - start, terms[:, block])
                    self._score(tokens, atoms, scratch, lists.bounds[block])
                    self._collect(tokens, atoms, scratch, lists, block)
            self._refine(exact, weight, lists)
            self._select(exact, lists)
            undecided.append(lists.counts == _GIVEN_UP.value)
        flags = torch.cat(undecided)
        return flags.to(torch.uint8).argsort(descending=True, stable=True), flags.sum(dtype=torch.int32)

    def _sort_scores(self) -> None:
        """Encode all tokens by sorting all scores of a few at a time: for a k beyond what lists serve."""
        width = triton.cdiv(self.M, _BLOCK) * _BLOCK
        step = max(1, _MOST_SCORES // width)
        latents = torch.arange(self.M - 1, -1, -1, device=self.x.device)
        atoms = _Atoms(self.weight, 0, self.M)
        for first in range(0, self.N, step):
            count = min(step, self.N - first)
            tokens = _Tokens(self.x[first : first + count], count)
            scratch = self._scores(count, width)
            self._score(tokens, atoms, scratch, _Lists(count, 0, self.x.device).bounds)
            scores = scratch[0][:, : self.M]
            keys = scores if self.scale is None else scores * self.scale
            keys = keys.abs() if self.absolute else keys
            bits = keys.masked_fill(keys == 0, 0.0).view(torch.int32)
            orders = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).masked_fill(keys.isnan(), _LARGEST.value).long()
            if self.mask is not None:
                orders = orders.masked_fill(~self.mask, _UNSET.value)
            best = ((orders << 32) | latents).topk(self.k).values
            indices = self.M - 1 - (best & 0xFFFFFFFF)
            values = scores.gather(1, indices)
            if self.relu:
                values = values.masked_fill(values <= 0, 0.0)
            self.values[first : first + count] = values
            self.indices[first : first + count] = indices

    # What follows launches one kernel each.

    def _round(self, matrix: Tensor, count: int, stripe: _Atoms | None = None) -> tuple[Tensor, Tensor]:
        """Rows of tokens, or of a stripe, in bf16 and padded to whole 16-byte packets; their bracket's terms."""
        padded = triton.cdiv(self.D, 8) * 8
        rounded = self.x.new_empty(count, padded, dtype=torch.bfloat16)
        terms = self.x.new_empty(3, count)
        begin = stripe.begin if stripe else 0
        bias, scale, order = (
            None if stripe is None or vector is None else vector[begin:]
            for vector in (self.bias, self.scale, self.order)
        )
        _round[(count,)](
            matrix,
            order,
            scale,
            bias,
            rounded,
            terms,
            matrix.stride(0),
            self.D,
            padded,
            count,
            TOKENS=stripe is None,
            BLOCK=1024,
            num_warps=4,
            **OPTIONS,
        )
        return rounded, terms

    def _score(self, tokens: _Tokens, atoms: _Atoms, scratch: tuple[Tensor, Tensor], bounds: Tensor) -> None:
        D = tokens.matrix.shape[1]

        def launch(tile: Tile, bounds: Tensor = bounds) -> None:
            grid = triton.cdiv(tokens.count, tile.tokens) * triton.cdiv(atoms.count, tile.latents)
            _score[(grid,)](
                tokens.matrix,
                atoms.matrix,
                self.bias,
                self.scale,
                tokens.rows,
                tokens.live,
                tokens.first,
                atoms.order,
                self.live_latents,
                bounds,
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
                ABSOLUTE=self.absolute,
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
        key = ("topk_encode", bounds.device, dtype, D, strides, tokens.count.bit_length())
        tuned(key, tiles(dtype, tokens.count), launch)

    def _collect(
        self, tokens: _Tokens, atoms: _Atoms, scratch: tuple[Tensor, Tensor], lists: _Lists, block: slice
    ) -> None:
        options = lists.options()
        _collect[(triton.cdiv(tokens.count, options["ROWS"]),)](
            *scratch,
            self.scale,
            tokens.live,
            tokens.first,
            self.live_latents,
            tokens.terms,
            0 if tokens.terms is None else tokens.terms.stride(0),
            atoms.terms,
            *lists.columns[:, block],
            lists.counts[block],
            lists.bounds[block],
            tokens.count,
            atoms.begin,
            atoms.count,
            scratch[0].shape[1],
            self.M,
            self.k,
            ABSOLUTE=self.absolute,
            BLOCK=_BLOCK,
            **options,
        )

    def _refine(self, tokens: _Tokens, weight: Tensor, lists: _Lists) -> None:
        split = 16 if tokens.count < _MOST_TOKENS and not INTERPRETED else 4
        _refine[(tokens.count * split,)](
            tokens.matrix,
            weight,
            self.bias,
            self.scale,
            self.order,
            *lists.columns,
            lists.counts,
            self.D,
            tokens.matrix.stride(0),
            weight.stride(0),
            ABSOLUTE=self.absolute,
            SPLIT=split,
            BLOCK_K=8,
            BLOCK_D=512,
            CAPACITY=lists.capacity,
            num_warps=4,
            **OPTIONS,
        )

    def _select(self, tokens: _Tokens, lists: _Lists) -> None:
        options = lists.options()
        selected = triton.next_power_of_2(self.k)
        _select[(triton.cdiv(tokens.count, options["ROWS"]),)](
            *lists.columns,
            lists.counts,
            self.order,
            tokens.rows,
            tokens.live,
            tokens.first,
            self.values,
            self.indices,
            tokens.count,
            self.k,
            RELU=self.relu,
            SELECTED=selected,
            CHUNK=min(selected, max(1, 4096 // selected)),
            **options,
        )


def topk_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    activation: str = "relu",
    latent_scale: Tensor | None = None,
    latent_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x (N, D), weight (M, D), bias and latent_scale (M,), latent_mask (M,) bool; returns two (N, k)."""
    return _Encoder(x, weight, bias, k, activation, latent_scale, latent_mask).run()
