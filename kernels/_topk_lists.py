"""topk_encode's lists of what may be among a row's k best, and the k best of them, in order.

A list that fills is compacted: the row's bound rises to the k-th largest key, and what lies below goes,
ties by the lowest latent. k entries remain, so that there is always room for a block more: no input
overflows a list. In a screen, where brackets overlap, more may remain: such a row is given up.

A list has three columns. Of exact scores: the order of the key, the score's bits, the latent's position
among the eligible. Of a screen's, the first two are the orders of the key's lower and upper bound.
"""

import torch
import triton
import triton.language as tl
from fastsparse.kernels._launch import INTERPRETED, OPTIONS
from fastsparse.kernels._order import LARGEST, UNSET, kth_largest, order_of
from fastsparse.kernels._topk_screen import error_of

BLOCK = 512  # scores that a row's list takes in at a time
GIVEN_UP = tl.constexpr(-1)  # in place of a count: the screen can't decide this row


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
    lower = tl.load(firsts + base[:, None] + every, mask=every < held[:, None], other=UNSET)
    bound = tl.maximum(bound, kth_largest(lower, k, DIGIT))
    room = k - tl.sum((lower > bound[:, None]).to(tl.int32), axis=1)
    kept_before = tl.zeros_like(held)
    # Chunk by chunk, which takes few registers: entries only ever move to the front.
    for start in range(0, tl.max(held, axis=0), CHUNK):
        slot = start + tl.arange(0, CHUNK)[None, :]
        real = slot < held[:, None]
        at = base[:, None] + slot
        first = tl.load(firsts + at, mask=real, other=UNSET)
        second = tl.load(seconds + at, mask=real, other=UNSET)
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
        error = error_of(near, far, norm, residual, rest)
        lower = key - error
        first = order_of(tl.where(lower == lower, lower, float("-inf")))
        second = order_of(key + error)
    else:
        first = order_of(key)
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
def collect(
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
    held = tl.load(counts + row, mask=live, other=GIVEN_UP)
    bound = tl.load(bounds + row, mask=live, other=LARGEST)
    near, far = held, held
    if SCREEN:
        near = tl.load(token_terms + row, mask=live, other=0.0)
        far = tl.load(token_terms + token_stride + row, mask=live, other=0.0)
    base = row * CAPACITY
    lane = tl.arange(0, BLOCK)

    if (begin == 0) & (count_live >= 2 * BLOCK) & (2 * k <= BLOCK):
        # A first bound: the stripe's latents dealt into BLOCK groups, the k-th largest of the groups' maxima.
        maxima = tl.full((ROWS, BLOCK), UNSET, tl.int32)
        for start in range(0, count_live, BLOCK):
            column = start + lane
            marked = live[:, None] & (column < count_live)[None, :]
            lower, _ = _entries(
                scores, width, scale, near, far, atom_terms, count, row, column, marked, begin, ABSOLUTE
            )
            maxima = tl.maximum(maxima, tl.where(marked, lower, UNSET))
        # One less, since of exact keys only those above a bound pass.
        first_bound = kth_largest(maxima, k, DIGIT) - (0 if SCREEN else 1)
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
                    held = tl.where(fits, held, GIVEN_UP)
                    bound = tl.where(fits, bound, LARGEST)
                    passing = passing & fits[:, None]
                    added = tl.where(fits, added, 0)
            at = base[:, None] + held[:, None] + tl.cumsum(passing.to(tl.int32), axis=1) - 1
            tl.store(firsts + at, first, mask=passing)
            tl.store(seconds + at, second, mask=passing)
            tl.store(positions + at, tl.broadcast_to((begin + column)[None, :], (ROWS, BLOCK)), mask=passing)
            held += added
    tl.store(counts + row, held, mask=live)
    tl.store(bounds + row, bound, mask=live)


@triton.jit
def select(
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
    held = tl.load(counts + row, mask=live, other=GIVEN_UP)
    base = row * CAPACITY
    unset = tl.full((ROWS,), UNSET, tl.int32)
    held, _ = _compact(firsts, seconds, positions, base, held, unset, k, False, CAPACITY, BLOCK // 2, DIGIT)

    slot = tl.arange(0, SELECTED)
    real = slot[None, :] < held[:, None]
    at = base[:, None] + slot[None, :]
    key = tl.load(firsts + at, mask=real, other=UNSET)
    rank = tl.zeros((ROWS, SELECTED), tl.int32)
    for start in range(0, SELECTED, RIVALS):
        rival = start + tl.arange(0, RIVALS)
        rivals = tl.load(
            firsts + base[:, None] + rival[None, :], mask=rival[None, :] < held[:, None], other=UNSET
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


class Lists:
    """The lists of some tokens: three columns, how much they hold, and the rows' bounds."""

    def __init__(self, tokens: int, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.columns = torch.empty(3, tokens, capacity, dtype=torch.int32, device=device)
        self.counts = torch.zeros(tokens, dtype=torch.int32, device=device)
        self.bounds = torch.full((tokens,), UNSET.value, dtype=torch.int32, device=device)

    def options(self) -> dict:
        """Of a kernel that works on lists: several rows a program where programs run one after another."""
        rows = 16 if INTERPRETED else 1
        sizes = {"ROWS": rows, "BLOCK": BLOCK, "DIGIT": 4 if INTERPRETED else 1, "CAPACITY": self.capacity}
        return {**sizes, "num_warps": self.warps(self.capacity), **OPTIONS}

    @staticmethod
    def warps(capacity: int) -> int:
        """So that a thread holds 8 of a list's entries."""
        return capacity // 256


def rivals_of(selected: int) -> int:
    """How many of the k best `select` compares with all of them at a time."""
    return min(selected, max(1, 4096 // selected))
