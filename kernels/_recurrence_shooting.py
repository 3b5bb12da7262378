"""Gated recurrences by multiple shooting (Keller 1968): chunks of time at once, each from a guess.

A program takes a block of channels and, of each, CHUNKS chunks of STEPS steps at most; then the next ones.
Every chunk is run, along with its derivative P in its start; where its end misses the next one's start, by
m, the starts are off by D[j] = P[j - 1] D[j - 1] + m[j], which a scan over chunks solves. They are corrected
until that is at rounding level, and so is what it makes of every state of the chunk, P D at most. Then
steps are taken once more, from starts corrected for the last time, to be written. What follows starts from
the last state, in fp32, so that no error gets from one round to the next.

Bytes: those of the sequential kernel from HBM; a round's inputs are read again by every pass, from L1 or L2:
CHUNKS * STEPS * BLOCK * 12, which are 192 KB in fp32. Operations: for each pass a step and its derivative.
"""

import triton
import triton.language as tl
from fastsparse.kernels._cells import load_weights, step, step_with_derivative
from fastsparse.kernels._channels import block_of_channels, load_inputs, load_state, store_state, wide
from fastsparse.kernels._corrections import (
    SMALL,
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
from fastsparse.kernels._scan import product_of_pairs


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
    PASSES: tl.constexpr,
    CHUNKS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``passes`` of every channel: the most that a round took, or -1 where one was given up."""
    place, real, channel, row, begin, length = block_of_channels(cu_seqlens, channels, T, H, BLOCK)
    H, u_time, u_gate = wide(H), wide(u_time), wide(u_gate)
    w = spread(load_weights(weight, peephole, channel, real, H))
    carry = load_state(h0, c0, place, real, peephole is not None)
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
            ends, P, made, largest, widest = _run(w, here, u_time, u_gate, starts, left, steps)
            missed = difference(shifted(ends, start, chunk), starts)
            D, before = corrections(shifted(P, P, chunk), missed, shifted(made, spread(errors), chunk))
            # Read again: a register that held it all the while would be one too many.
            allowed = most_spread(load_state(h0, c0, place, real, peephole is not None))
            steady = tl.fma(largest, trace(before), widest) <= allowed[None, :]
            later = last(_sum(carried_errors(P, before), made), chunk)
            small = steady & within(D, starts) & _carried_within(D, ends, P, largest)
            certain = tl.min((small | (left == 0)).to(tl.int32), axis=0) > 0
            starts = corrected(starts, D, trying[None, :])
            taken = tl.where(trying & certain, attempt, taken)
            trying = trying & (certain == 0)
        most = tl.where(trying | (most < 0), -1, tl.maximum(most, taken))
        errors = later
        carry = last(_write(w, here, u_time, u_gate, starts, left, steps, h, c, target, H), chunk)
        longest = tl.max(tl.where(most < 0, 0, length), axis=0)
        first += CHUNKS * steps
        target += CHUNKS * steps * H
    tl.store(passes + place, most, mask=real)


@triton.jit
def _run(w, source, time, gate, starts, left, steps):
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
        state, J = step_with_derivative(w, now, state)
        P = _product(J, P)
        errors = with_one_more(carried_errors(J, errors))
        largest = tl.maximum(largest, tl.where(t < left, _squares(P), 0.0))
        widest = tl.maximum(widest, tl.where(t < left, trace(errors), 0.0))
    return state, P, errors, largest, widest


@triton.jit
def _write(w, source, time, gate, state, left, steps, h, c, target, H):
    """The steps of every chunk, written; the last state."""
    coming = load_inputs(source, gate, left > 0)
    for t in range(steps):
        now = coming
        source += time
        coming = load_inputs(source, gate, t + 1 < left)
        state = step(w, now, state)
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
def _sum(a, b):
    found = ()
    for i in tl.static_range(len(a)):
        found += (a[i] + b[i],)
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


@triton.jit
def _product(J, P):
    return (J[0] * P[0],) if len(P) == 1 else product_of_pairs(J, P)
