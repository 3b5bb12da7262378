"""Gated recurrences step by step: a thread a channel, as long as there are steps.

A step waits for the one before: some ten operations in a row, of which five go to the special function unit,
about 200 cycles. Its inputs wait for nobody: they are loaded AHEAD steps before they are needed, and twice
that at the begin of a batch of them, so that memory, some 800 cycles away, is out of the way.

The same kernel serves what a parallel solver gave up, so that the answer is the same to the last bit.
Bytes: an element of u three times and of h once, at most once each (c too, of an LSTM).
"""

import triton
import triton.language as tl
from fastsparse.kernels._cells import load_weights, step
from fastsparse.kernels._channels import block_of_channels, load_inputs, load_state, store_state, wide


# Not specialized: to be one kernel, whoever calls.
@triton.jit(do_not_specialize=["below"])
def sequential(
    u,
    weight,
    peephole,
    h0,
    c0,
    cu_seqlens,
    h,
    c,
    passes,
    channels,
    T,
    H,
    u_row,
    u_time,
    u_gate,
    u_channel,
    below,
    AHEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The channels of which ``passes`` is below a number: below 0 it was given up, below 1 also not tried."""
    place, real, channel, row, begin, length = block_of_channels(cu_seqlens, channels, T, H, BLOCK)
    H, u_time, u_gate = wide(H), wide(u_time), wide(u_gate)
    todo = real & (tl.load(passes + place, mask=real, other=0) < below)
    length = tl.where(todo, length, 0)
    longest = tl.max(length, axis=0)
    if longest > 0:
        w = load_weights(weight, peephole, channel, todo, H)
        state = load_state(h0, c0, place, todo, peephole is not None)
        source = u + row * u_row + begin * u_time + channel * u_channel
        target = (row * T + begin) * H + channel
        coming = _load_steps(source, u_time, u_gate, tl.minimum(length, AHEAD).to(tl.int32), AHEAD)
        for first in range(0, longest, AHEAD):
            now = coming
            source += AHEAD * u_time
            left = tl.minimum(length - first, 2 * AHEAD).to(tl.int32)
            coming = _load_steps(source, u_time, u_gate, left - AHEAD, AHEAD)
            for i in tl.static_range(AHEAD):
                state = step(w, now[i], state)
                store_state(h, c, target, state, i < left)
                target += H


@triton.jit
def _load_steps(source, time, gate, left, STEPS: tl.constexpr):
    """The inputs of so many steps, of channels that have ``left``."""
    found = ()
    for i in tl.static_range(STEPS):
        found += (load_inputs(source + i * time, gate, i < left),)
    return found
