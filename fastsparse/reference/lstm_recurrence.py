"""The LSTM of ParaRNN (Danieli et al. 2025, arXiv 2510.21450): one state (c, h) a channel, and no mixing."""

from functools import partial

import torch
from torch import Tensor

from fastsparse.reference._precision import accumulate
from fastsparse.reference._sequences import Sequences
from fastsparse.reference._solvers import Cell, solve
from fastsparse.reference.linear_recurrence import adjoint


def gates(
    state: Tensor, u: Tensor, weight: Tensor, peephole: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forget gate, candidate, the next c, and output gate, each (..., H).

    state (..., 2, H) is (c, h); u (..., 3, H) and weight (3, H) are for f, o and the candidate; peephole
    (2, H) is for f, which sees the c before, and o, which sees the one after. The input gate is 1 - f.
    """
    c, h = state.unbind(-2)
    (u_f, u_o, u_g), (w_f, w_o, w_g), (p_f, p_o) = u.unbind(-2), weight.unbind(0), peephole.unbind(0)
    f = torch.sigmoid(w_f * h + p_f * c + u_f)
    g = torch.tanh(w_g * h + u_g)
    after = f * c + (1 - f) * g
    o = torch.sigmoid(w_o * h + p_o * after + u_o)
    return f, g, after, o


def step(state: Tensor, u: Tensor, weight: Tensor, peephole: Tensor) -> Tensor:
    """The next (c, h), (..., 2, H)."""
    _, _, c, o = gates(state, u, weight, peephole)
    return torch.stack((c, o * torch.tanh(c)), dim=-2)


def jacobian(state: Tensor, u: Tensor, weight: Tensor, peephole: Tensor) -> Tensor:
    """The derivative of the next (c, h) in (c, h): a block (..., 2, 2, H)."""
    (c, _), (w_f, w_o, w_g), (p_f, p_o) = state.unbind(-2), weight.unbind(0), peephole.unbind(0)
    f, g, after, o = gates(state, u, weight, peephole)
    squashed, d_f, d_o = torch.tanh(after), f * (1 - f) * (c - g), o * (1 - o)
    c_c = f + d_f * p_f
    c_h = d_f * w_f + (1 - f) * (1 - g * g) * w_g
    of_c = d_o * p_o * squashed + o * (1 - squashed * squashed)  # of the next h in the next c
    rows = (c_c, c_h), (of_c * c_c, d_o * w_o * squashed + of_c * c_h)
    return torch.stack([torch.stack(row, dim=-2) for row in rows], dim=-3)


def lstm_recurrence(
    u: Tensor,
    weight: Tensor,
    peephole: Tensor,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    solver: str = "sequential",
) -> tuple[Tensor, Tensor, Tensor]:
    """u (B, T, 3, H), weight (3, H), peephole (2, H), h0 and c0 (S, H) or zeros; returns h, c and passes.

    h and c are (B, T, H), passes (S, H) int32. The recurrence is :func:`step`; all else as in gru_recurrence.
    """
    sequences = Sequences(cu_seqlens, u.shape[1])
    rows = sequences.split(accumulate(u))
    weights = {"weight": accumulate(weight), "peephole": accumulate(peephole)}
    cell = Cell(partial(step, **weights), partial(jacobian, **weights))
    states, passes = solve(cell, rows, _start(rows, h0, c0), solver)
    c, h = sequences.join(states).to(u.dtype).unbind(-2)
    return h.contiguous(), c.contiguous(), passes


def lstm_recurrence_backward(
    u: Tensor,
    weight: Tensor,
    peephole: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    cu_seqlens: Tensor | None,
    h: Tensor,
    c: Tensor,
    d_h: Tensor | None,
    d_c: Tensor | None,
    needs_u: bool,
    needs_weights: bool,
    needs_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradient of :func:`lstm_recurrence`, from what it returned: d_u, d_weight, d_peephole, d_h0, d_c0.

    As gru_recurrence_backward, with lambda (c, h) and the transposed blocks. What isn't needed is empty.
    """
    sequences = Sequences(cu_seqlens, u.shape[1])
    rows, d_h, d_c = (
        sequences.split(torch.zeros_like(accumulate(h)) if tensor is None else accumulate(tensor))
        for tensor in (u, d_h, d_c)
    )
    states = sequences.split(accumulate(torch.stack((c, h), dim=-2)))
    before = torch.cat((_start(rows, h0, c0).unsqueeze(1), states), dim=1)[:, :-1]
    wide = accumulate(weight), accumulate(peephole)
    (w_f, w_o, w_g), (p_f, p_o) = wide
    c_before, h_before = before.unbind(-2)
    f, g, after, o = gates(before, rows, *wide)
    J = jacobian(before, rows, *wide)
    to_c, to_h = adjoint(J, torch.stack((d_c, d_h), dim=-2)).unbind(-2)
    squashed = torch.tanh(after)
    d_o = to_h * squashed * o * (1 - o)
    d_after = to_c + to_h * o * (1 - squashed * squashed) + d_o * p_o
    d_f = d_after * (c_before - g) * f * (1 - f)
    d_g = d_after * (1 - f) * (1 - g * g)
    d_u = d_weight = d_peephole = d_h0 = d_c0 = None
    if needs_u:
        d_u = sequences.join(torch.stack((d_f, d_o, d_g), dim=-2)).to(u.dtype)
    if needs_weights:
        terms = torch.stack((d_f * h_before, d_o * h_before, d_g * h_before), dim=-2)
        d_weight = terms.sum(dim=(0, 1)).to(weight.dtype)
        terms = torch.stack((d_f * c_before, d_o * after), dim=-2)
        d_peephole = terms.sum(dim=(0, 1)).to(peephole.dtype)
    if needs_state:  # zeros where there is no step
        d_h0 = (d_f * w_f + d_o * w_o + d_g * w_g)[:, :1].sum(dim=1).to(u.dtype)
        d_c0 = (d_after * f + d_f * p_f)[:, :1].sum(dim=1).to(u.dtype)
    grads = d_u, d_weight, d_peephole, d_h0, d_c0
    return tuple(u.new_empty(0) if grad is None else grad for grad in grads)


def _start(rows: Tensor, h0: Tensor | None, c0: Tensor | None) -> Tensor:
    """(c, h) before the first step, (S, 2, H)."""
    zeros = rows.new_zeros(rows.shape[0], rows.shape[-1])
    return torch.stack([zeros if state is None else accumulate(state) for state in (c0, h0)], dim=-2)
