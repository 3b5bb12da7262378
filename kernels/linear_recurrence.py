"""h_t = a_t h_{t-1} + b_t along time, of single channels and of pairs that 2x2 blocks couple.

A program has a block of channels of one sequence, and goes through time tile by tile. A tile's steps are
joined by a scan in registers, and in shared memory between warps; the state goes on to the next tile, whose
inputs are on their way meanwhile. So every input is read once and every state written once: in fp32 12 bytes
a step and channel, 32 a pair, over the bandwidth of memory.
"""

import torch
import triton
import triton.language as tl
from fastsparse.kernels._launch import OPTIONS
from fastsparse.kernels._scan import carried, finite, is_sound, load, load_addends, load_factors, solve
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

__all__ = ["DTYPES", "linear_recurrence"]

# 32 channels, so that rows are lines of memory; eight elements a thread, or two pairs, as registers allow.
TILES = {False: Tile(64, 32, 8), True: Tile(32, 32, 16)}  # of channels, of pairs


@triton.jit
def _linear_recurrence(
    a,
    b,
    h0,
    cu_seqlens,
    h,
    T,
    H,
    a_sequence,
    a_time,
    a_row,
    a_column,
    a_channel,
    b_sequence,
    b_time,
    b_row,
    b_channel,
    REVERSE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):
    s, row, begin, length, channel = sequence_of(cu_seqlens, T, H, BLOCK_H)
    width = 2 * H if PAIRS else H
    a += row * a_sequence + (channel * a_channel)[None, :]
    b += row * b_sequence + (channel * b_channel)[None, :]
    h += row * T * width + channel[None, :]
    real = channel < H
    there = real[None, :]
    unread = 1 if h0 is None else 0  # without a state the first factor isn't read
    end = length
    for again in tl.static_range(2):
        start = s * width + channel
        if PAIRS:
            state = load_or_zeros(h0, start, real), load_or_zeros(h0, start + H, real)
        else:
            state = (load_or_zeros(h0, start, real),)
        ahead = tl.arange(0, 1 if again else BLOCK_T)[:, None]
        for first in tl.range(0, end, ahead.shape[0], num_stages=1 if again else STAGES):
            step = first + ahead.to(tl.int64)
            place = place_of(step, begin, length, REVERSE)
            inside = there & (step < length)
            read = inside & (step >= unread)
            factors = load_factors(a + place * a_time, a_row, a_column, read, 0.0, PAIRS)
            states = solve(factors, load_addends(b + place * b_time, b_row, inside, PAIRS), state)
            for i in tl.static_range(len(states)):
                out = h + place * width + i * H
                wanted = inside
                if again:
                    wanted = inside & (finite(load(out, inside)) == 0)
                tl.store(out, states[i].to(h.dtype.element_ty), mask=wanted)
            state = carried(states, ahead)
        # What isn't finite is made again, step by step.
        end = tl.where(tl.min(is_sound(state).to(tl.int32), axis=0) == 0, length, 0)
        tl.debug_barrier()


def linear_recurrence(
    a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool, cu_seqlens: Tensor | None
) -> Tensor:
    """a and b (B, T, H), h0 (S, H), or of pairs a (B, T, 2, 2, H), b (B, T, 2, H), h0 (S, 2, H)."""
    T, H, pairs = b.shape[1], b.shape[-1], b.dim() == 4
    h = torch.empty_like(b, memory_format=torch.contiguous_format)
    if h.numel() == 0:
        return h
    if not pairs:
        a, b = a.unsqueeze(2).unsqueeze(2), b.unsqueeze(2)
    tile = tile_of(TILES[pairs], T)
    _linear_recurrence[(tile.programs(sequences(b, cu_seqlens), H),)](
        a,
        b,
        *(None if tensor is None else tensor.contiguous() for tensor in (h0, cu_seqlens)),
        h,
        T,
        H,
        *a.stride(),
        *b.stride(),
        REVERSE=reverse,
        PAIRS=pairs,
        **tile.options,
        **OPTIONS,
    )
    return h
