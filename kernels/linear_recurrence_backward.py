"""The gradient of linear_recurrence: lambda_t = d_h_t + a_{t+1}^T lambda_{t+1}, against time.

It is kernels/linear_recurrence.py in the other direction, by the factors of the step after. While lambda is
in registers d_b = lambda and d_a_t = lambda_t h_{t-1}^T are made of it, so that everything is read or written
once: in fp32 20 bytes a step and channel, 56 a pair.
"""

import triton
import triton.language as tl
from fastsparse.kernels._blocks import spread
from fastsparse.kernels._launch import OPTIONS
from fastsparse.kernels._scan import (
    carried,
    finite,
    is_sound,
    load,
    load_addends,
    load_factors,
    solve,
    times,
)
from fastsparse.kernels._sequences import (
    DTYPES,
    Tile,
    load_or_zeros,
    place_of,
    sequence_of,
    sequences,
    tile_of,
)
from torch import Tensor

__all__ = ["DTYPES", "linear_recurrence_backward"]

# 32 channels, so that rows are lines of memory; four elements a thread, or one pair, as registers allow.
TILES = {False: Tile(32, 32, 8), True: Tile(16, 32, 16)}  # of channels, of pairs


@triton.jit
def _store(at, value, inside, again: tl.constexpr):
    """Once more only where what is there isn't finite."""
    wanted = inside
    if again:
        wanted = inside & (finite(load(at, inside)) == 0)
    tl.store(at, value.to(at.dtype.element_ty), mask=wanted)


@triton.jit
def _linear_recurrence_backward(
    a,
    h0,
    cu_seqlens,
    h,
    d_h,
    d_a,
    d_b,
    d_h0,
    T,
    H,
    a_sequence,
    a_time,
    a_row,
    a_column,
    a_channel,
    d_h_sequence,
    d_h_time,
    d_h_row,
    d_h_channel,
    AGAINST: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):
    s, row, begin, length, channel = sequence_of(cu_seqlens, T, H, BLOCK_H)
    STATES: tl.constexpr = 2 if PAIRS else 1
    width = STATES * H
    after = 1 if AGAINST else -1  # in time, where the recurrence goes
    columns = a + row * a_sequence + channel * a_channel
    d_h += row * d_h_sequence + (channel * d_h_channel)[None, :]
    rows = row * T * width + channel[None, :]
    real = channel < H
    there = real[None, :]
    start = ()
    for i in tl.static_range(STATES):
        start += (load_or_zeros(h0, s * width + i * H + channel, real),)
    start = spread(start)
    end = length
    for again in tl.static_range(2):
        onward = ()
        for _ in tl.static_range(STATES):
            onward += (tl.zeros((BLOCK_H,), tl.float32),)
        ahead = tl.arange(0, 1 if again else BLOCK_T)[:, None]
        for first in tl.range(0, end, ahead.shape[0], num_stages=1 if again else STAGES):
            step = first + ahead.to(tl.int64)
            place = place_of(step, begin, length, AGAINST)
            inside = there & (step < length)
            # Steps outside of the sequence change nothing: its last one is what the last row of a tile has.
            factors = load_factors(
                columns[None, :] + (place + after) * a_time, a_column, a_row, inside & (step > 0), 1.0, PAIRS
            )
            upstream = load_addends(d_h + place * d_h_time, d_h_row, inside, PAIRS)
            reaching = solve(factors, upstream, onward)
            onward = carried(reaching, ahead)
            if d_b is not None:
                for i in tl.static_range(STATES):
                    _store(d_b + rows + place * width + i * H, reaching[i], inside, again)
            if d_a is not None:
                known = inside & (step < length - 1)
                for j in tl.static_range(STATES):
                    before = load(h + rows + (place - after) * width + j * H, known)
                    before = tl.where(known, before, start[j])
                    for i in tl.static_range(STATES):
                        value = reaching[i] * before
                        if h0 is None:  # then the first factor wasn't read
                            value = tl.where(known, value, 0.0)
                        out = (row * T + place) * (STATES * width) + (i * STATES + j) * H + channel[None, :]
                        _store(d_a + out, value, inside, again)
        if d_h0 is not None:
            taken = channel < tl.where(end > 0, H, 0)
            at_first = columns + place_of(length - 1, begin, length, AGAINST) * a_time
            d_start = times(load_factors(at_first, a_column, a_row, taken, 0.0, PAIRS), onward)
            for i in tl.static_range(STATES):
                _store(d_h0 + s * width + i * H + channel, d_start[i], taken if again else real, again)
        # What isn't finite is made again, step by step.
        end = tl.where(tl.min(is_sound(onward).to(tl.int32), axis=0) == 0, length, 0)
        tl.debug_barrier()


def linear_recurrence_backward(
    a: Tensor,
    h0: Tensor | None,
    reverse: bool,
    cu_seqlens: Tensor | None,
    h: Tensor,
    d_h: Tensor,
    needs_a: bool,
    needs_b: bool,
    needs_h0: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """d_a, d_b and d_h0, of the shapes of a, h and h0; empty where they aren't needed."""
    T, H, S, pairs = h.shape[1], h.shape[-1], sequences(h, cu_seqlens), h.dim() == 4
    d_a = h.new_empty(a.shape) if needs_a else None
    d_b = h.new_empty(h.shape) if needs_b else None
    d_h0 = h.new_empty(S, *h.shape[2:]) if needs_h0 else None
    if S * H and (needs_a or needs_b or needs_h0):
        if not pairs:
            a, d_h = a.unsqueeze(2).unsqueeze(2), d_h.unsqueeze(2)
        tile = tile_of(TILES[pairs], T)
        _linear_recurrence_backward[(tile.programs(S, H),)](
            a,
            *(None if tensor is None else tensor.contiguous() for tensor in (h0, cu_seqlens, h)),
            d_h,
            d_a,
            d_b,
            d_h0,
            T,
            H,
            *a.stride(),
            *d_h.stride(),
            AGAINST=not reverse,
            PAIRS=pairs,
            **tile.options,
            **OPTIONS,
        )
    return tuple(h.new_empty(0) if part is None else part for part in (d_a, d_b, d_h0))
