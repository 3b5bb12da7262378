"""The gradient of gated recurrences: against time, from inputs and states alone.

What reaches a state in all is lambda_t = d_t + J_{t+1}^T lambda_{t+1}. All gates and derivatives J of a tile
are computed again at once, from the states before its steps, a scan solves for mu_t = J_t^T lambda_t, what
goes on from a step to the one before, and lambda is then d and the mu of the step after. The weights'
gradient is summed by every program along its sequence, and over sequences at the end, by PyTorch.

Bytes a step and channel in fp32: of a GRU 20 read and 12 written, of an LSTM 28 and 12.
"""

import torch
import triton
import triton.language as tl
from fastsparse.kernels._blocks import plus, shifted, spread, totals, where, zeros
from fastsparse.kernels._cells import STATES, back, load_weights, step_with_derivative
from fastsparse.kernels._launch import OPTIONS
from fastsparse.kernels._scan import carried, finite, is_sound, solve, times
from fastsparse.kernels._sequences import Tile, load_or_zeros, place_of, sequence_of, sequences, tile_of
from torch import Tensor

# 32 channels, so that rows are lines of memory; two elements a thread, as registers allow.
TILES = {1: Tile(32, 32, 16), 2: Tile(16, 32, 8)}  # by how many states there are


@triton.jit
def _transposed(J, inside):
    """What takes gradients back through a step; one outside of the sequence, that changes nothing."""
    if len(J) == 1:
        factors = (tl.where(inside, J[0], 1.0),)
    else:
        first = tl.where(inside, J[0], 1.0), tl.where(inside, J[2], 0.0)
        factors = first[0], first[1], tl.where(inside, J[1], 0.0), tl.where(inside, J[3], 1.0)
    return factors


@triton.jit
def _load(base, at, mask):
    return tl.load(base + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_before(states, start, at, known, mask):
    """The states before a tile's steps."""
    return tl.where(known, _load(states, at, known & mask), start[None, :])


@triton.jit
def _load_upstream(d, row, place, channel, sequence, time, width, mask):
    found = tl.zeros(mask.shape, tl.float32)
    if d is not None:
        found = _load(d, row * sequence + place * time + channel * width, mask)
    return found


@triton.jit
def _recurrence_backward(
    u,
    weight,
    peephole,
    h0,
    c0,
    cu_seqlens,
    h,
    c,
    d_h,
    d_c,
    d_u,
    d_weights,
    d_h0,
    d_c0,
    T,
    H,
    u_sequence,
    u_time,
    u_gate,
    u_channel,
    d_h_sequence,
    d_h_time,
    d_h_channel,
    d_c_sequence,
    d_c_time,
    d_c_channel,
    CELL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):
    s, row, begin, length, channels = sequence_of(cu_seqlens, T, H, BLOCK_H)
    channel = channels[None, :]
    there = channel < H
    w = load_weights(weight, peephole, channel, there, H)
    COUNT: tl.constexpr = 1 if c is None else 2
    real = channels < H
    start_h = load_or_zeros(h0, s * H + channels, real)
    start_c = load_or_zeros(c0, s * H + channels, real)
    mu = zeros(COUNT, (BLOCK_H,))
    sums = zeros(len(w), (BLOCK_H,))
    end = length
    sound = channels < 0
    for again in tl.static_range(2):
        ahead = tl.arange(0, 1 if again else BLOCK_T)[:, None]
        onward = zeros(COUNT, (BLOCK_H,))
        terms = zeros(len(w), (ahead.shape[0], BLOCK_H))
        for first in tl.range(0, end, ahead.shape[0], num_stages=1 if again else STAGES):
            step = first + ahead.to(tl.int64)
            place = place_of(step, begin, length, True)
            inside = there & (step < length)
            at = u + row * u_sequence + place * u_time + channel * u_channel
            inputs = _load(at, 0, inside), _load(at, u_gate, inside), _load(at + u_gate, u_gate, inside)
            known = step < length - 1
            at = (row * T + place - 1) * H + channel
            state_h = _load_before(h, start_h, at, known, there)
            upstream_h = _load_upstream(d_h, row, place, channel, d_h_sequence, d_h_time, d_h_channel, inside)
            if c is None:
                state = (state_h,)
                d = (upstream_h,)
            else:
                state = _load_before(c, start_c, at, known, there), state_h
                d = (
                    _load_upstream(d_c, row, place, channel, d_c_sequence, d_c_time, d_c_channel, inside),
                    upstream_h,
                )
            _, J = step_with_derivative(CELL, w, inputs, state)
            J = _transposed(J, inside)
            mus = solve(J, times(J, d), onward)
            through = where(inside, plus(d, shifted(mus, spread(onward), ahead)), zeros(COUNT, inside.shape))
            onward = carried(mus, ahead)
            _, d_inputs, more = back(CELL, w, inputs, state, through)
            terms = plus(terms, more)
            if d_u is not None:
                for i in tl.static_range(3):
                    out = d_u + ((row * T + place) * 3 + i) * H + channel
                    wanted = inside
                    if again:
                        wanted = inside & (finite(_load(out, 0, inside)) == 0)
                    tl.store(out, d_inputs[i].to(d_u.dtype.element_ty), mask=wanted)
        # Where anything isn't finite it is made again, step by step, and so are the sums that it went into.
        mu = where(sound, mu, onward)
        sums = where(sound, sums, totals(terms))
        sound = is_sound(mu)
        end = tl.where(tl.min(sound.to(tl.int32), axis=0) == 0, length, 0)
        tl.debug_barrier()
    if d_weights is not None:
        for i in tl.static_range(len(sums)):
            out = d_weights + (s * len(sums) + i) * H + channels
            tl.store(out, sums[i], mask=real)
    if d_h0 is not None:
        out = s * H + channels
        tl.store(d_h0 + out, mu[COUNT - 1].to(d_h0.dtype.element_ty), mask=real)
        if d_c0 is not None:
            tl.store(d_c0 + out, mu[0].to(d_c0.dtype.element_ty), mask=real)


def recurrence_backward(
    cell: str,
    u: Tensor,
    weight: Tensor,
    peephole: Tensor | None,
    start: tuple[Tensor | None, Tensor | None],
    cu_seqlens: Tensor | None,
    states: tuple[Tensor, Tensor | None],
    upstream: tuple[Tensor | None, Tensor | None],
    needs_u: bool,
    needs_weights: bool,
    needs_state: bool,
) -> tuple[Tensor, ...]:
    """d_u, the gradient of weight and peephole, of h0 and c0; empty where it isn't needed.

    start, states and upstream are of (h, c). Where there is no peephole or no c it is None, and left out.
    """
    (_, T, _, H), S, pairs = u.shape, sequences(u, cu_seqlens), STATES[cell] == 2
    weights = [part for part in (weight, peephole) if part is not None]
    d_u = u.new_empty(u.shape) if needs_u else None
    d_h0 = u.new_empty(S, H) if needs_state else None
    d_c0 = u.new_empty(S, H) if needs_state and pairs else None
    rows = [len(part) for part in weights]
    sums = u.new_empty(S, sum(rows), H, dtype=torch.float32) if needs_weights else None
    if S * H:
        tile = tile_of(TILES[STATES[cell]], T)
        _recurrence_backward[(tile.programs(S, H),)](
            u,
            *(_contiguous(tensor) for tensor in (weight, peephole, *start, cu_seqlens, *states)),
            *upstream,
            d_u,
            sums,
            d_h0,
            d_c0,
            T,
            H,
            *u.stride(),
            *(stride for d in upstream for stride in ((0, 0, 0) if d is None else d.stride())),
            CELL=cell,
            **tile.options,
            **OPTIONS,
        )
    d_weights = (
        [None] * len(rows) if sums is None else [part.sum(0).to(u.dtype) for part in sums.split(rows, 1)]
    )
    found = [d_u, *d_weights, *(d_h0, d_c0)[: 1 + pairs]]
    return tuple(u.new_empty(0) if part is None else part for part in found)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
