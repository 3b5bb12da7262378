"""TopK encoding in Triton: a product whose epilogue filters, a collector of survivors, an exact select.

Latents are scored stripe by stripe. `_score` is a matrix product that writes only what it must: of every
tile one bit a score, set where the score may still be among its row's k largest, and the scores of the set
bits. `_collect` reads the bits (1/32 of the scores' bytes), appends the survivors to a bounded list a row,
in the order of their latents, and raises the row's bound to the exact k-th largest key seen. `_select`
finds the rank of each of the k best by counting. The scores' matrix never exists, there is no atomic and no
sort.

Why bits: a product that appends to lists in its epilogue needs atomics whose results it uses, on which
Triton 3.9 aborts, or a prefix sum over the tile, which spills. Packing bits is one reduction along a tile's
rows.

Of a stripe that is a share s of the latents seen with it, about k s scores a row survive, a 32-byte sector
each; the bits of all scores are N M / 8 bytes. Both vanish beside the product's 2 N M D operations. Every
tile of a stripe reads x and weight from L2: 2 (1/128 + 1/128) bytes for 2 operations, far below what L2
gives.

A list that fills is compacted: the row's bound rises to the k-th largest key, and what lies below goes,
ties by the lowest latent. k entries remain, so that there is always room for a block more: no input
overflows a list. In a screen, where brackets overlap, more may remain. Such a row is given up and done
again without a screen; which rows these are stays on the device.

fp32 is screened in bf16 and refined exactly where that pays; else it is scored by FMAs.

The same call gives bitwise the same answer: the order of every sum is fixed by the shapes and the tile,
which the clock chooses once for every class of shapes. Nothing waits for the device, but that choice when
it is first made.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from fastsparse.kernels._launch import INTERPRETED, OPTIONS, chosen, with_unit_stride
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Screening of fp32: by what pays (None), or for tests never (False) or wherever it is possible (True).
screening: bool | None = None

_MOST_TOKENS = 2048  # scored at a time: 16 tiles, so that a wave of tiles is about square
_MOST_SCREENED_TOKENS = 8192  # that share one rounding of the weight
_LEAST_SCORES, _MOST_SCORES = 2**22, 2**24  # of a stripe
_BLOCK = 512  # scores that a row's list takes in at a time
_MOST_K = 1024  # beyond, PyTorch sorts
_MOST_CANDIDATES = 1536  # of a row in a screen; more make it undecided

_UNSET = tl.constexpr(-(2**31))  # below the order of every key
_LARGEST = tl.constexpr(2**31 - 1)  # the order of NaN
_INFINITE = 0x7F800000  # the order of infinity
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
def _kth_largest(orders, k, DIGIT: tl.constexpr):
    """Of every row of orders (R, C >= k) the k-th largest: DIGIT bits at a time, from the highest down."""
    found = tl.full((orders.shape[0],), _UNSET, tl.int32)
    digits = tl.arange(0, 1 << DIGIT)
    for step in range(32 // DIGIT):
        wanted = found[:, None] + (digits << (32 - DIGIT * (step + 1)))[None, :]
        reaching = tl.sum((orders[:, :, None] >= wanted[:, None, :]).to(tl.int32), axis=1)
        digit = tl.sum((reaching >= k).to(tl.int32), axis=1) - 1
        found += digit << (32 - DIGIT * (step + 1))
    return found


# ---- a screen's terms ----
#
# Error bracket. With x = x~ + dx, w = w~ + dw, in bf16 and what that leaves, X = |x~|, W = |w~| and
# g = (D + 4) 2^-24, by Cauchy-Schwarz
#   |x.w - x~.w~|               <= |dx| W + (X + |dx|) |dw|
#   the product's accumulation  <= 3 g X W, since tensor cores cut off where a processor rounds: 2.5 D 2^-24
#     (Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores", 8 products to a sum at the least)
#   the exact score's own       <= g (X + |dx|) (W + |dw|)
# which sums to A W + B |dw| with A = |dx| (1 + g) + 4 g X and B = (X + |dx|)(1 + g). The bias's rounding is
# relative to it; that of score + bias and of the product with a scale are the 4 in g. Inf and NaN in any of
# these widen the bracket to everything. Squares may underflow, for which 2^-125 each makes up: rows as small
# as that stay undecided.


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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows in bf16, padded with zeros, and their terms: A, B of tokens; W, |dw| and the rest of latents."""
    position = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = position < count
    row = position
    if order is not None:
        row = tl.load(order + position, mask=inside, other=0)
    near = tl.zeros((ROWS, BLOCK), tl.float32)
    far = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, padded, BLOCK):
        d = start + tl.arange(0, BLOCK)
        at = source + row[:, None] * row_stride + d[None, :]
        exact = tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        short = exact.to(tl.bfloat16)
        to = rounded + position[:, None] * padded + d[None, :]
        tl.store(to, short, mask=inside[:, None] & (d < padded)[None, :])
        kept = short.to(tl.float32)
        near += kept * kept
        far += (exact - kept) * (exact - kept)
    slack = 1.001 + D * 2.0**-23
    norm = tl.sqrt(tl.sum(near, axis=1) + D * 2.0**-125) * slack
    residual = tl.sqrt(tl.sum(far, axis=1) + D * 2.0**-125) * slack
    if TOKENS:
        g = (D + 4) * 2.0**-24
        tl.store(terms + position, 1.001 * (residual * (1 + g) + 4 * g * norm), mask=inside)
        tl.store(terms + count + position, 1.001 * (norm + residual) * (1 + g), mask=inside)
    else:
        rest = tl.zeros_like(norm) + D * 2.0**-125
        if bias is not None:
            rest += 2.0**-20 * tl.abs(tl.load(bias + position, mask=inside, other=0.0))
        if scale is not None:
            factor = tl.abs(tl.load(scale + position, mask=inside, other=0.0))
            norm *= factor
            residual *= factor
            rest *= factor
        tl.store(terms + position, norm, mask=inside)
        tl.store(terms + count + position, residual, mask=inside)
        tl.store(terms + 2 * count + position, rest + 2.0**-125, mask=inside)


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
# A row's list has three columns. Of exact scores: the order of the key, the score's bits, the latent's
# position among the eligible. Of a screen's, the first two are the orders of the key's lower and upper bound.


@triton.jit
def _compact(
    firsts,
    seconds,
    positions,
    base,
    held,
    bound,
    k,
    SCREEN: tl.constexpr,
    CAPACITY: tl.constexpr,
    CHUNK: tl.constexpr,
    DIGIT: tl.constexpr,
):
    """Raise the rows' bounds to the k-th largest key and drop what can't be among the k; keeps the order."""
    tl.debug_barrier()  # the program's own stores
    every = tl.arange(0, CAPACITY)[None, :]
    lower = tl.load(firsts + base[:, None] + every, mask=every < held[:, None], other=_UNSET)
    bound = tl.maximum(bound, _kth_largest(lower, k, DIGIT))
    room = k - tl.sum((lower > bound[:, None]).to(tl.int32), axis=1)
    kept_before = tl.zeros_like(held)
    # Chunk by chunk, which takes few registers: entries only ever move to the front.
    for start in range(0, tl.max(held, axis=0), CHUNK):
        slot = start + tl.arange(0, CHUNK)[None, :]
        real = slot < held[:, None]
        at = base[:, None] + slot
        first = tl.load(firsts + at, mask=real, other=_UNSET)
        second = tl.load(seconds + at, mask=real, other=_UNSET)
        position = tl.load(positions + at, mask=real, other=0)
        if SCREEN:
            kept = real & (second >= bound[:, None])
        else:
            level = (real & (first == bound[:, None])).to(tl.int32)
            kept = (first > bound[:, None]) | ((level != 0) & (tl.cumsum(level, axis=1) <= room[:, None]))
            room -= tl.sum(level, axis=1)
        to = (base + kept_before - 1)[:, None] + tl.cumsum(kept.to(tl.int32), axis=1)
        kept_before += tl.sum(kept.to(tl.int32), axis=1)
        tl.debug_barrier()
        tl.store(firsts + to, first, mask=kept)
        tl.store(seconds + to, second, mask=kept)
        tl.store(positions + to, position, mask=kept)
    tl.debug_barrier()
    return tl.where(held >= 0, kept_before, held), bound


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
    DIGIT: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Append a stripe's survivors to the lists of ROWS rows."""
    SCREEN: tl.constexpr = token_terms is not None
    if live_rows is not None:
        N = tl.minimum(N, tl.load(live_rows) - first_row)
    count_live = count
    if live_latents is not None:
        count_live = tl.maximum(0, tl.minimum(count, tl.load(live_latents) - begin))
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
        # A first bound: the stripe's latents dealt into BLOCK groups, the k-th largest of the groups' maxima.
        maxima = tl.full((ROWS, BLOCK), _UNSET, tl.int32)
        for start in range(0, count_live, BLOCK):
            column = start + lane
            marked = live[:, None] & (column < count_live)[None, :]
            lower, _ = _entries(
                scores, width, scale, near, far, atom_terms, count, row, column, marked, begin, ABSOLUTE
            )
            maxima = tl.maximum(maxima, tl.where(marked, lower, _UNSET))
        # One less, since of exact keys only those above a bound pass.
        first_bound = _kth_largest(maxima, k, DIGIT) - (0 if SCREEN else 1)
        bound = tl.where(live, first_bound, bound)

    # The k-th best of twice as many latents is a bound worth the work of finding it. In the end a screen's
    # lists must hold only what can still win. Then one more, empty block follows.
    stripe = begin // width
    raises = ((stripe & (stripe - 1)) == 0) | (SCREEN & (begin + count == M))
    for start in range(0, count_live + raises.to(tl.int32) * BLOCK, BLOCK):
        column = start + lane
        inside = (live & (held >= 0))[:, None] & (column < count_live)[None, :]
        word = tl.load(words + row[:, None] * (width // 32) + (column // 32)[None, :], mask=inside, other=0)
        marked = ((word >> (column % 32)[None, :]) & 1) != 0
        ends = start >= count_live
        if ends | (tl.max(tl.max(marked.to(tl.int32), axis=1), axis=0) > 0):
            first, second = _entries(
                scores, width, scale, near, far, atom_terms, count, row, column, marked, begin, ABSOLUTE
            )
            passing = marked & _passing(first, second, bound, SCREEN)
            added = tl.sum(passing.to(tl.int32), axis=1)
            if ends | (tl.max(held + added, axis=0) > CAPACITY):
                held, bound = _compact(
                    firsts, seconds, positions, base, held, bound, k, SCREEN, CAPACITY, BLOCK // 2, DIGIT
                )
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
    BLOCK: tl.constexpr,
    DIGIT: tl.constexpr,
    CAPACITY: tl.constexpr,
    SELECTED: tl.constexpr,
    RIVALS: tl.constexpr,
):
    """Cut the lists of ROWS rows to the k best; write each to its rank, found by counting who is better."""
    if live_rows is not None:
        N = tl.minimum(N, tl.load(live_rows) - first_row)
    if tl.program_id(0) * ROWS >= N:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < N
    held = tl.load(counts + row, mask=live, other=_GIVEN_UP)
    base = row * CAPACITY
    unset = tl.full((ROWS,), _UNSET, tl.int32)
    held, _ = _compact(firsts, seconds, positions, base, held, unset, k, False, CAPACITY, BLOCK // 2, DIGIT)

    slot = tl.arange(0, SELECTED)
    real = slot[None, :] < held[:, None]
    at = base[:, None] + slot[None, :]
    key = tl.load(firsts + at, mask=real, other=_UNSET)
    rank = tl.zeros((ROWS, SELECTED), tl.int32)
    for start in range(0, SELECTED, RIVALS):
        rival = start + tl.arange(0, RIVALS)
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


def tiles(dtype: torch.dtype, tokens: int, even: bool = True, screened: bool = False) -> list[Tile]:
    """The tiles worth trying, the safest first."""
    if INTERPRETED:
        return [Tile(64, 128, 64, 1, 1)]
    if dtype == torch.float32:  # FMAs out of registers
        return [Tile(64, 64, 16, 4, 2)]
    if tokens <= 64:  # a stream of the weight
        return [Tile(max(16, triton.next_power_of_2(tokens)), 64, 128, 4, 3)]
    if not even:  # masks and addresses take registers
        return [Tile(64, 128, 64, 8, 2)]
    narrow = Tile(128, 64, 64, 8, 3)
    # The brackets take registers, of which the wide one has none left on sm_100.
    return [narrow] if screened else [Tile(128, 128, 64, 8, 3), narrow]


def _rivals(selected: int) -> int:
    """How many of the k best `_select` compares with all of them at a time."""
    return min(selected, max(1, 4096 // selected))


@dataclass(frozen=True)
class _Tokens:
    """A block of tokens: rows of the product's matrix, or those that `rows` lists, from `first` to `live`."""

    matrix: Tensor
    count: int
    terms: Tensor | None = None
    first: int = 0
    rows: Tensor | None = None
    live: Tensor | None = None


@dataclass(frozen=True)
class _Atoms:
    """A stripe of latents: rows of the product's matrix, or those that `order` lists."""

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
        sizes = {"ROWS": rows, "BLOCK": _BLOCK, "DIGIT": 4 if INTERPRETED else 1, "CAPACITY": self.capacity}
        return {**sizes, "num_warps": self.warps(self.capacity), **OPTIONS}

    @staticmethod
    def warps(capacity: int) -> int:
        """So that a thread holds 8 of a list's entries."""
        return capacity // 256


class _Encoder:
    """One call: the arguments as kernels want them, and the ways to serve a block of tokens."""

    def __init__(self, x, weight, bias, k, activation, latent_scale, latent_mask) -> None:
        # Kernels count in 32 bits along a tile's columns.
        x, weight = (matrix if matrix.stride(1) < 2**24 else matrix.contiguous() for matrix in (x, weight))
        self.x, self.weight, self.k = x, weight, k
        (self.N, self.D), self.M = x.shape, weight.shape[0]
        self.absolute, self.relu = activation == "abs", activation == "relu"
        self.mask = latent_mask
        self.order = self.live_latents = None  # the eligible latents, in order, and how many they are
        if latent_mask is not None and k <= _MOST_K:
            self.order = latent_mask.to(torch.uint8).argsort(descending=True, stable=True)
            self.live_latents = latent_mask.sum(dtype=torch.int32)
        self.bias, self.scale = self._by_position(bias), self._by_position(latent_scale)
        self.values = x.new_empty(self.N, k)
        self.indices = x.new_empty(self.N, k, dtype=torch.int64)

    def _by_position(self, vector: Tensor | None) -> Tensor | None:
        """A vector over the latents in fp32; where only some are eligible, over these."""
        if vector is None:
            return None
        return (vector if self.order is None else vector[self.order]).float().contiguous()

    def run(self) -> tuple[Tensor, Tensor]:
        if self.N == 0:
            return self.values, self.indices
        if self.k > _MOST_K:
            self._sort_scores()
        elif self._screens():
            self._plain(*self._screen())
        else:
            self._plain()
        return self.values, self.indices

    def _screens(self) -> bool:
        # Brackets that widen with D let pass up to 4 k of Gaussian scores (at D = 4096), and their spread.
        fits = (8 if self.D > 2048 else 4) * self.k <= _MOST_CANDIDATES
        possible = self.x.dtype == torch.float32 and self.D > 0 and fits
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
        """Encode all tokens by screen and refine; returns all, the undecided ones first, and their number."""
        x, weight = with_unit_stride(self.x), with_unit_stride(self.weight)
        capacity = triton.next_power_of_2(min(8 * self.k, _MOST_CANDIDATES) + _BLOCK)
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
        """Rows of tokens, or of a stripe, in bf16 and padded to 16-byte packets; the bracket's terms."""
        padded = triton.cdiv(self.D, 8) * 8
        rounded = self.x.new_empty(count, padded, dtype=torch.bfloat16)
        terms = self.x.new_empty(3, count)
        begin = stripe.begin if stripe else 0
        bias, scale, order = (
            None if stripe is None or vector is None else vector[begin:]
            for vector in (self.bias, self.scale, self.order)
        )
        rows = 256 if INTERPRETED else 1
        _round[(triton.cdiv(count, rows),)](
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
            ROWS=rows,
            BLOCK=min(1024, triton.next_power_of_2(padded)),
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
        screened = tokens.terms is not None
        key = ("topk_encode", bounds.device, dtype, D, strides, tokens.count.bit_length(), screened)
        choice = tiles(dtype, tokens.count, D % 64 == 0, screened)
        # Timed with bounds that nothing passes, as almost nothing does after the first stripe.
        launch(chosen(key, choice, lambda tile: launch(tile, torch.full_like(bounds, _INFINITE))))

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
            **options,
        )

    def _refine(self, tokens: _Tokens, weight: Tensor, lists: _Lists) -> None:
        # Programs enough for the machine, whatever the tokens.
        split = 1 if INTERPRETED else 4 if tokens.count >= _MOST_TOKENS else 16
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
            BLOCK_K=256 if INTERPRETED else 8,
            BLOCK_D=min(512, triton.next_power_of_2(self.D)),
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
            RIVALS=_rivals(selected),
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


def specimens() -> list[tuple]:
    """The kernels as they run, to be compiled without a GPU: name, kernel, signature, constants, options."""
    list_of = {"firsts": "*i32:16", "seconds": "*i32:16", "positions": "*i32:16", "counts": "*i32:16"}
    half, single = torch.bfloat16, torch.float32
    pointers = {half: "*bf16:16", single: "*fp32:16"}

    def specimen(name: str, kernel, constants: dict, **signature: str) -> tuple:
        options = {
            option: constants.pop(option) for option in ("num_warps", "num_stages") if option in constants
        }
        constants |= dict.fromkeys(set(kernel.arg_names) - set(signature) - set(constants))
        return name, kernel, signature, constants, options | OPTIONS

    def score(name: str, dtype: torch.dtype, tile: Tile, even: bool = True, **optional: str) -> tuple:
        sizes = dict.fromkeys(("N", "begin", "count", "first_row", "token_stride"), "i32")
        strides = dict.fromkeys(("D", "x_row", "weight_row"), "i32:16" if even else "i32")
        blocks = {"BLOCK_N": tile.tokens, "BLOCK_M": tile.latents, "BLOCK_D": tile.depth}
        constants = {
            "x_column": 1,
            "weight_column": 1,
            "ABSOLUTE": bool(optional),
            "EVEN_D": even,
            "UPCAST": False,
        }
        out = {"bounds": "*i32:16", "scores": "*fp32:16", "words": "*i32:16", "width": "i32:16"}
        return specimen(
            f"score, {name}, {tile.tokens} x {tile.latents} x {tile.depth}",
            _score,
            constants | blocks | {"num_warps": tile.warps, "num_stages": tile.stages},
            x=pointers[dtype], weight=pointers[dtype], bias="*fp32:16", **sizes, **strides, **out, **optional,
        )  # fmt: skip

    def listing(name: str, kernel, capacity: int, constants: dict, **signature: str) -> tuple:
        warps = _Lists.warps(capacity)
        constants = {
            "ROWS": 1,
            "BLOCK": _BLOCK,
            "DIGIT": 1,
            "CAPACITY": capacity,
            "num_warps": warps,
        } | constants
        return specimen(f"{name}, lists of {capacity}", kernel, constants, **list_of, **signature)

    everything = {
        "scale": "*fp32:16",
        "rows": "*i64:16",
        "live_rows": "*i32:16",
        "order": "*i64:16",
        "live_latents": "*i32:16",
    }
    bracket = {"token_terms": "*fp32:16", "atom_terms": "*fp32"}
    screened = bracket | {"scale": "*fp32:16", "live_latents": "*i32:16"}
    found = [score("bf16", half, tile) for tile in tiles(half, 2048)]
    found += [score("bf16, options", half, tile, **everything) for tile in tiles(half, 2048)]
    found += [score("bf16 screen, options", half, tile, **screened) for tile in tiles(half, 2048, True, True)]
    found += [score("bf16 screen, any D", half, tile, False, **screened) for tile in tiles(half, 2048, False)]
    found += [score("bf16, few tokens", half, tile) for tile in tiles(half, 16)]
    found += [score("fp32, any D", single, tile, False, **everything) for tile in tiles(single, 2048)]
    stripe = dict.fromkeys(("first_row", "token_stride", "N", "begin", "count", "M", "k"), "i32")
    stripe |= {"scores": "*fp32:16", "words": "*i32:16", "bounds": "*i32:16", "width": "i32:16"}
    optional = {name: kind for name, kind in everything.items() if name not in ("rows", "order")}
    found += [listing("collect", _collect, 1024, {"ABSOLUTE": False}, **stripe)]
    for capacity in (1024, 2048):
        found += [
            listing(
                "collect, screen", _collect, capacity, {"ABSOLUTE": True}, **stripe, **optional, **bracket
            )
        ]
    out = {"values": "*bf16:16", "indices": "*i64:16", "first_row": "i32", "N": "i32", "k": "i32"}
    out |= {name: everything[name] for name in ("order", "rows", "live_rows")}
    for capacity, selected in ((1024, 64), (2048, 1024)):
        constants = {"RELU": True, "SELECTED": selected, "RIVALS": _rivals(selected)}
        found += [listing("select", _select, capacity, constants, **out)]
    rounding = {"source": "*fp32:16", "rounded": "*bf16:16", "terms": "*fp32:16", "row_stride": "i32:16"}
    rounding |= {"D": "i32:16", "padded": "i32:16", "count": "i32"}
    constants = {"ROWS": 1, "BLOCK": 1024, "num_warps": 4}
    found += [
        specimen(
            "round", _round, {"TOKENS": False} | constants, **rounding,
            order="*i64", bias="*fp32", scale="*fp32",
        ),
        specimen(
            "refine", _refine,
            {"ABSOLUTE": True, "SPLIT": 4, "BLOCK_K": 8, "BLOCK_D": 512, "CAPACITY": 1024, "num_warps": 4},
            x="*fp32:16", weight="*fp32:16", bias="*fp32:16", scale="*fp32:16", order="*i64:16", **list_of,
            D="i32:16", x_row="i32:16", weight_row="i32:16",
        ),
    ]  # fmt: skip
    return found
