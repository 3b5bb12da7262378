"""Gated recurrences by three solvers (fastsparse/reference/_solvers.py). A program has a block of channels.

Step by step, the channels of a block side by side, as long as there are steps. A step waits for the one
before: some ten operations in a row, of which five go to the special function unit, about 200 cycles. Its
inputs wait for nobody: they are loaded AHEAD steps before they are needed, and twice that at the begin of a
batch of them, so that memory, some 800 cycles away, is out of the way. The same kernel serves what a parallel
solver gave up, so that the answer is the same to the last bit.

By Newton's method, tile after tile of time. A program holds the inputs and the states of a tile's steps in
registers, and corrects all states at once: what they are off by is a linear recurrence, solved by a scan
along the tile. When every channel's correction is at rounding level, the tile is written and its last state
is what the next one starts from, in fp32. To solve tiles one after the other, and not all of time at once,
reads every input once, and lets no error of one tile into the next. For each pass: a step with its
derivative, and a scan.

By multiple shooting (Keller 1968), of each channel CHUNKS chunks of STEPS steps at most, each from a guess;
then the next ones. Every chunk is run, along with its derivative P in its start; where its end misses the
next one's start, by m, the starts are off by D[j] = P[j - 1] D[j - 1] + m[j], which a scan over chunks
solves. They are corrected until that is at rounding level, and so is what it makes of every state of the
chunk, P D at most. Then steps are taken once more, from starts corrected for the last time, to be written.
What follows starts from the last state, in fp32, so that no error gets from one round to the next. For each
pass: a step and its derivative.

Bytes: an element of u three times and of h once, at most once each (c too, of an LSTM). Shooting reads a
round's inputs again in every pass, from L1 or L2: CHUNKS * STEPS * BLOCK * 12, which are 192 KB in fp32.
"""

import triton
import triton.language as tl
from fastsparse.kernels._blocks import last, minus, plus, shifted, spread, where
from fastsparse.kernels._cells import load_weights, step, step_with_derivative
from fastsparse.kernels._channels import block_of_channels, load_inputs, load_state, store_state, wide
from fastsparse.kernels._corrections import (
    SMALL,
    carried_errors,
    corrections,
    most_spread,
    no_errors,
    trace,
    with_one_more,
    within,
)
from fastsparse.kernels._scan import product


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
    CELL: tl.constexpr,
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
        state = load_state(h0, c0, place, todo, c is not None)
        source = u + row * u_row + begin * u_time + channel * u_channel
        target = (row * T + begin) * H + channel
        coming = _load_steps(source, u_time, u_gate, tl.minimum(length, AHEAD).to(tl.int32), AHEAD)
        for first in range(0, longest, AHEAD):
            now = coming
            source += AHEAD * u_time
            left = tl.minimum(length - first, 2 * AHEAD).to(tl.int32)
            coming = _load_steps(source, u_time, u_gate, left - AHEAD, AHEAD)
            for i in tl.static_range(AHEAD):
                state = step(CELL, w, now[i], state)
                store_state(h, c, target, state, i < left)
                target += H


@triton.jit
def _load_steps(source, time, gate, left, STEPS: tl.constexpr):
    """The inputs of so many steps, of channels that have ``left``."""
    found = ()
    for i in tl.static_range(STEPS):
        found += (load_inputs(source + i * time, gate, i < left),)
    return found


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
    CELL: tl.constexpr,
    PASSES: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``passes`` of every channel: the most that a tile took, or -1 where one was given up."""
    place, real, channel, row, begin, length = block_of_channels(cu_seqlens, channels, T, H, BLOCK)
    H, u_time, u_gate = wide(H), wide(u_time), wide(u_gate)
    w = spread(load_weights(weight, peephole, channel, real, H))
    carry = load_state(h0, c0, place, real, c is not None)
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
        state = step(CELL, w, inputs, start)
        trying = (length > first) & (most >= 0)
        taken = tl.zeros([BLOCK], tl.int32)
        later = errors
        attempt = 0
        while (attempt < PASSES) & (tl.max(trying.to(tl.int32), axis=0) > 0):
            attempt += 1
            before = shifted(state, start, ahead)
            after, J = step_with_derivative(CELL, w, inputs, before)
            d, spreading = corrections(J, minus(after, state), _made(J, spread(errors), ahead))
            later = last(spreading, ahead)
            state = where(trying[None, :], plus(state, d), state)
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


@triton.jit
def shooting(
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
    CELL: tl.constexpr,
    PASSES: tl.constexpr,
    CHUNKS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``passes`` of every channel: the most that a round took, or -1 where one was given up."""
    place, real, channel, row, begin, length = block_of_channels(cu_seqlens, channels, T, H, BLOCK)
    H, u_time, u_gate = wide(H), wide(u_time), wide(u_gate)
    w = spread(load_weights(weight, peephole, channel, real, H))
    carry = load_state(h0, c0, place, real, c is not None)
    longest = tl.max(length, axis=0)
    rounds = tl.maximum(tl.cdiv(longest, CHUNKS * STEPS), 1)
    steps = tl.cdiv(longest, rounds * CHUNKS).to(tl.int32)  # of a chunk, in rounds of one size
    chunk = tl.arange(0, CHUNKS)[:, None]
    source = (u + row * u_row + begin * u_time + channel * u_channel)[None, :] + chunk * steps * u_time
    target = ((row * T + begin) * H + channel)[None, :] + chunk * steps * H
    most = tl.zeros([BLOCK], tl.int32)
    errors = no_errors(carry)  # those of rounding that carry has
    first = tl.zeros_like(longest)
    while first < longest:
        left = tl.maximum(tl.minimum((length - first)[None, :] - chunk * steps, steps), 0).to(tl.int32)
        here = source + first.to(tl.int64) * u_time  # carried along, it wouldn't compile for AMD's GPUs
        start = spread(carry)
        starts = _everywhere(start, left)
        trying = (length > first) & (most >= 0)
        taken = tl.zeros([BLOCK], tl.int32)
        later = errors
        attempt = 0
        while (attempt < PASSES) & (tl.max(trying.to(tl.int32), axis=0) > 0):
            attempt += 1
            ends, P, made, largest, widest = _run(CELL, w, here, u_time, u_gate, starts, left, steps)
            missed = minus(shifted(ends, start, chunk), starts)
            D, before = corrections(shifted(P, P, chunk), missed, shifted(made, spread(errors), chunk))
            # Read again: a register that held it all the while would be one too many.
            allowed = most_spread(load_state(h0, c0, place, real, c is not None))
            steady = tl.fma(largest, trace(before), widest) <= allowed[None, :]
            later = last(plus(carried_errors(P, before), made), chunk)
            small = steady & within(D, starts) & _carried_within(D, ends, P, largest)
            certain = tl.min((small | (left == 0)).to(tl.int32), axis=0) > 0
            starts = where(trying[None, :], plus(starts, D), starts)
            taken = tl.where(trying & certain, attempt, taken)
            trying = trying & (certain == 0)
        most = tl.where(trying | (most < 0), -1, tl.maximum(most, taken))
        errors = later
        carry = last(_write(CELL, w, here, u_time, u_gate, starts, left, steps, h, c, target, H), chunk)
        longest = tl.max(tl.where(most < 0, 0, length), axis=0)
        first += CHUNKS * steps
        target += CHUNKS * steps * H
    tl.store(passes + place, most, mask=real)


@triton.jit
def _run(CELL: tl.constexpr, w, source, time, gate, starts, left, steps):
    """Every chunk's last state, its derivative in the start, the covariance of rounding errors since.

    Also the largest sum of that derivative's squared entries, and the largest variance.
    """
    state = starts
    P = _unity(starts)
    errors = no_errors(starts)
    largest, widest = tl.zeros(left.shape, tl.float32), tl.zeros(left.shape, tl.float32)
    coming = load_inputs(source, gate, left > 0)
    for t in range(steps):
        now = coming
        source += time
        coming = load_inputs(source, gate, t + 1 < left)
        state, J = step_with_derivative(CELL, w, now, state)
        P = product(J, P)
        errors = with_one_more(carried_errors(J, errors))
        largest = tl.maximum(largest, tl.where(t < left, _squares(P), 0.0))
        widest = tl.maximum(widest, tl.where(t < left, trace(errors), 0.0))
    return state, P, errors, largest, widest


@triton.jit
def _write(CELL: tl.constexpr, w, source, time, gate, state, left, steps, h, c, target, H):
    """The steps of every chunk, written; the last state."""
    coming = load_inputs(source, gate, left > 0)
    for t in range(steps):
        now = coming
        source += time
        coming = load_inputs(source, gate, t + 1 < left)
        state = step(CELL, w, now, state)
        store_state(h, c, target, state, t < left)
        target += H
    return state


@triton.jit
def _carried_within(D, ends, P, largest):
    """Whether what a chunk's start is off by is at rounding level in all its states; not where one is NaN.

    Beside 1: stricter than the reference where states exceed it, while they remember a start that did.
    """
    off = tl.abs(D[0])
    if len(D) == 2:
        off += tl.abs(D[1])
    off *= tl.sqrt(largest)
    squares = _squares(P)
    found = (squares == squares) & (off <= SMALL)
    for i in tl.static_range(len(D)):
        found = found & (ends[i] == ends[i])
    return found


@triton.jit
def _squares(P):
    """The sum of the squares of its entries, which bounds the square of what it multiplies sizes by."""
    found = P[0] * P[0]
    for i in tl.static_range(1, len(P)):
        found = tl.fma(P[i], P[i], found)
    return found


@triton.jit
def _everywhere(values, like):
    """Vectors of channels, spread, as full blocks."""
    found = ()
    for i in tl.static_range(len(values)):
        found += (tl.broadcast_to(values[i], like.shape),)
    return found


@triton.jit
def _unity(states):
    one = tl.full(states[0].shape, 1.0, tl.float32)
    zero = tl.zeros(states[0].shape, tl.float32)
    return (one,) if len(states) == 1 else (one, zero, zero, one)
