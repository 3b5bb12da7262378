"""h_t = a_t h_{t-1} + b_t along time, of single channels and of pairs that 2x2 blocks couple.

A program has a block of channels of one sequence, and goes through time tile by tile. A tile's steps are
joined by a scan in registers, and in shared memory between warps; the state goes on to the next tile, which
is on its way meanwhile. So every input is read once and every state written once: in fp32 12 bytes a step
and channel, 32 a pair, over the bandwidth of memory.
"""

from itertools import product

import torch
import triton
import triton.language as tl
from fastsparse.kernels._launch import INTERPRETED, OPTIONS, pointer, specimen
from fastsparse.kernels._scan import row_of, scan, scan_pairs
from fastsparse.kernels._sequences import DTYPES, Tile, load_state, sequence_of, sequences, steps_of
from torch import Tensor

__all__ = ["DTYPES", "linear_recurrence", "specimens"]


@triton.jit
def _load(a, b, place, read, inside, a_time, a_row, a_column, b_time, b_row, PAIRS: tl.constexpr):
    """A tile of a and b, as they are stored: channels' or pairs' planes."""
    a += place * a_time
    b += place * b_time
    if PAIRS:
        return (
            tl.load(a, mask=read, other=0.0),
            tl.load(a + a_column, mask=read, other=0.0),
            tl.load(a + a_row, mask=read, other=0.0),
            tl.load(a + a_row + a_column, mask=read, other=0.0),
            tl.load(b, mask=inside, other=0.0),
            tl.load(b + b_row, mask=inside, other=0.0),
        )
    else:  # noqa: RET505, Triton goes on after a return
        return tl.load(a, mask=read, other=0.0), tl.load(b, mask=inside, other=0.0)


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
    there = (channel < H)[None, :]
    if PAIRS:
        state0 = load_state(h0, 2 * s, channel, H)
        state1 = load_state(h0, 2 * s + 1, channel, H)
    else:
        state0 = load_state(h0, s, channel, H)

    unread = 1 if h0 is None else 0  # without a state the first factor isn't read
    for start in tl.range(0, length, BLOCK_T, num_stages=STAGES):
        place, step = steps_of(start, begin, length, REVERSE, BLOCK_T)
        inside = there & (step < length)
        read = inside & (step >= unread)
        tile = _load(a, b, place, read, inside, a_time, a_row, a_column, b_time, b_row, PAIRS)
        out = h + place * width
        if PAIRS:
            h_0, h_1 = scan_pairs(
                tile[0].to(tl.float32),
                tile[1].to(tl.float32),
                tile[2].to(tl.float32),
                tile[3].to(tl.float32),
                tile[4].to(tl.float32),
                tile[5].to(tl.float32),
                state0,
                state1,
            )
            tl.store(out + H, h_1.to(h.dtype.element_ty), mask=inside)
            state1 = row_of(h_1, BLOCK_T - 1)
        else:
            h_0 = scan(tile[0].to(tl.float32), tile[1].to(tl.float32), state0)
        tl.store(out, h_0.to(h.dtype.element_ty), mask=inside)
        state0 = row_of(h_0, BLOCK_T - 1)


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
    S = sequences(b, cu_seqlens)
    tile = _tile(pairs, S, T, H)
    _linear_recurrence[(tile.programs(S, H),)](
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
        BLOCK_T=tile.steps,
        STAGES=2,
        BLOCK_H=tile.channels,
        num_warps=tile.warps,
        **OPTIONS,
    )
    return h


def _tile(pairs: bool, S: int, T: int, H: int) -> Tile:
    """32 channels, so that rows are lines of memory; in time what registers hold twice.

    Few programs have a GPU's multiprocessor to themselves, and take larger tiles, to have as much in flight.
    """
    if INTERPRETED:
        return Tile(32, 32, 1)
    steps, warps = (16, 4) if pairs else (64, 8)
    if Tile(steps, 32, warps).programs(S, H) < 256:
        steps, warps = 2 * steps, 2 * warps
    return Tile(min(steps, triton.next_power_of_2(T)), 32, warps)


def specimens() -> list[tuple]:
    """The kernel as it runs, to be compiled without a GPU: name, kernel, signature, constants, options."""
    found = []
    cases = product(((False, "channels"), (True, "pairs")), ("fp32", "bf16"), ((64, "many"), (1, "few")))
    for (pairs, form), kind, (S, programs) in cases:
        dtype, tile = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind], _tile(pairs, S, 2048, 1024)
        signature = dict.fromkeys(("a", "b", "h0", "h"), pointer(dtype)) | {"cu_seqlens": "*i64:16"}
        strides = ("a_sequence", "a_time", "a_row", "a_column", "b_sequence", "b_time", "b_row")
        signature |= dict.fromkeys(("T", "H", *strides), "i32:16")
        constants = {"a_channel": 1, "b_channel": 1, "REVERSE": True, "PAIRS": pairs}
        constants |= {"STAGES": 2, "BLOCK_T": tile.steps, "BLOCK_H": tile.channels, "num_warps": tile.warps}
        found.append(
            specimen(f"{form}, {kind}, {programs} programs", _linear_recurrence, constants, **signature)
        )
    return found
