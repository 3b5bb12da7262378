"""The channels of all sequences, on which recurrences run side by side: where each one's data lie.

They are counted sequence by sequence; a program takes a block of them, so that few channels, of many
sequences, fill it too. Everything here is in vectors of one element a channel.
"""

import triton
import triton.language as tl
from fastsparse.kernels._sequences import line_of, load_or_zeros


@triton.jit
def block_of_channels(cu_seqlens, channels, T, H, BLOCK: tl.constexpr):
    """This program's: (place among all, which are real, channel of its sequence, row, first step, length)."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = place < channels
    sequence = tl.where(real, place // H, 0)
    channel = tl.where(real, place - sequence * H, 0)
    row, begin, length = line_of(cu_seqlens, sequence, T)
    return place, real, channel, row, begin, tl.where(real, length, 0)


@triton.jit
def wide(size):
    """A size or stride that can be multiplied by steps."""
    return tl.cast(size, tl.int64)


@triton.jit
def load_state(h0, c0, place, real, PAIRS: tl.constexpr):
    """The states before the first step, (h,) or (c, h), of zeros where there are none."""
    h = load_or_zeros(h0, place, real)
    return (load_or_zeros(c0, place, real), h) if PAIRS else (h,)


@triton.jit
def load_inputs(at, gate, real):
    """The three pre-activations at pointers, in fp32; zeros where they aren't real."""
    return (
        tl.load(at, mask=real, other=0.0).to(tl.float32),
        tl.load(at + gate, mask=real, other=0.0).to(tl.float32),
        tl.load(at + 2 * gate, mask=real, other=0.0).to(tl.float32),
    )


@triton.jit
def store_state(h, c, at, state, real):
    """States at offsets into h and, of pairs, c."""
    if len(state) == 2:
        tl.store(c + at, state[0].to(c.dtype.element_ty), mask=real)
    tl.store(h + at, state[len(state) - 1].to(h.dtype.element_ty), mask=real)
