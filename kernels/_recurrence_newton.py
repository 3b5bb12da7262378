"""Gated recurrences by Newton's method, tile after tile of time.

A program holds the inputs and the states of a tile's steps, of a block of channels, in registers, and
corrects all states at once: what they are off by is a linear recurrence, solved by a scan along the tile.
When every channel's correction is at rounding level, the tile is written and its last state is what the next
one starts from, in fp32. To solve tiles one after the other, and not all of time at once, reads every input
once, and lets no error of one tile into the next.

Bytes: those of the sequential kernel. Operations: for each pass a step with its derivative, and a scan.
"""

import triton
import triton.language as tl
from fastsparse.kernels._cells import load_weights, step, step_with_derivative
from fastsparse.kernels._channels import block_of_channels, load_inputs, load_state, store_state, wide
from fastsparse.kernels._corrections import (
    carried_errors,
    corrected,
    corrections,
    difference,
    last,
    most_spread,
    no_errors,
    shifted,
    spread,
    trace,
    with_one_more,
    within,
)


@triton.jit
def newton(
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
    PASSES: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``passes`` of every channel: the most that a tile took, or -1 where one was given up."""
    place, real, channel, row, begin, length = block_of_channels(cu_seqlens, channels, T, H, BLOCK)
    H, u_time, u_gate = wide(H), wide(u_time), wide(u_gate)
    w = spread(load_weights(weight, peephole, channel, real, H))
    carry = load_state(h0, c0, place, real, peephole is not None)
    ahead = tl.arange(0, STEPS)[:, None]
    source = (u + row * u_row + begin * u_time + channel * u_channel)[None, :] + ahead * u_time
    target = ((row * T + begin) * H + channel)[None, :] + ahead * H
    most = tl.zeros([BLOCK], tl.int32)
    errors, allowed = no_errors(carry), most_spread(carry)  # errors: those of rounding that carry has
    longest = tl.max(length, axis=0)
    first = tl.zeros_like(longest)
    while first < longest:
        inside = ahead < (length - first)[None, :]
        # Carried along, a pointer wouldn't compile for AMD's GPUs.
        inputs = load_inputs(source + first.to(tl.int64) * u_time, u_gate, inside)
        start = spread(carry)
        state = step(w, inputs, start)
        trying = (length > first) & (most >= 0)
        taken = tl.zeros([BLOCK], tl.int32)
        later = errors
        attempt = 0
        while (attempt < PASSES) & (tl.max(trying.to(tl.int32), axis=0) > 0):
            attempt += 1
            before = shifted(state, start, ahead)
            after, J = step_with_derivative(w, inputs, before)
            d, spreading = corrections(J, difference(after, state), _made(J, spread(errors), ahead))
            later = last(spreading, ahead)
            state = corrected(state, d, trying[None, :])
            small = within(d, state) & (trace(spreading) <= allowed[None, :]) | (inside == 0)
            certain = tl.min(small.to(tl.int32), axis=0) > 0
            taken = tl.where(trying & certain, attempt, taken)
            trying = trying & (certain == 0)
        store_state(h, c, target, state, inside)
        most = tl.where(trying | (most < 0), -1, tl.maximum(most, taken))
        carry = last(state, ahead)
        errors = later
        longest = tl.max(tl.where(most < 0, 0, length), axis=0)
        first += STEPS
        target += STEPS * H
    tl.store(passes + place, most, mask=real)


@triton.jit
def _made(J, errors, ahead):
    """The covariance that each step adds to errors; the first one also carries on those of its start."""
    carried = carried_errors(J, errors)
    found = ()
    for i in tl.static_range(len(carried)):
        found += (tl.where(ahead == 0, carried[i], 0.0),)
    return with_one_more(found)
