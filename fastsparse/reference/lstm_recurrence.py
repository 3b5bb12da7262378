"""The LSTM of ParaRNN (Danieli et al. 2025, arXiv 2510.21450): one state (c, h) a channel, and no mixing."""

import torch
from torch import Tensor

from fastsparse.reference._gated import Cell, gated_recurrence, gated_recurrence_backward


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


def back(
    state: Tensor, u: Tensor, weight: Tensor, peephole: Tensor, through: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The gradients of (c, h) and u, and what the step adds to those of weight and peephole."""
    (c, h), (to_c, to_h) = state.unbind(-2), through.unbind(-2)
    (w_f, w_o, w_g), (p_f, p_o) = weight.unbind(0), peephole.unbind(0)
    f, g, after, o = gates(state, u, weight, peephole)
    squashed = torch.tanh(after)
    d_o = to_h * squashed * o * (1 - o)
    d_after = to_c + to_h * o * (1 - squashed * squashed) + d_o * p_o
    d_f = d_after * (c - g) * f * (1 - f)
    d_g = d_after * (1 - f) * (1 - g * g)
    d_state = torch.stack((d_after * f + d_f * p_f, d_f * w_f + d_o * w_o + d_g * w_g), dim=-2)
    d_weight = torch.stack((d_f * h, d_o * h, d_g * h), dim=-2)
    d_peephole = torch.stack((d_f * c, d_o * after), dim=-2)
    return d_state, torch.stack((d_f, d_o, d_g), dim=-2), (d_weight, d_peephole)


def moved(
    state: Tensor,
    u: Tensor,
    weight: Tensor,
    peephole: Tensor,
    t_u: Tensor,
    t_weight: Tensor,
    t_peephole: Tensor,
) -> Tensor:
    """How much the next (c, h) moves with u, weight and peephole."""
    c, h = state.unbind(-2)
    f, g, after, o = gates(state, u, weight, peephole)
    t_f, t_o, t_g = (t_u + t_weight * h.unsqueeze(-2)).unbind(-2)
    t_f = f * (1 - f) * (t_f + t_peephole[0] * c)
    t_after = t_f * (c - g) + (1 - f) * (1 - g * g) * t_g
    t_o = o * (1 - o) * (t_o + t_peephole[1] * after + peephole[1] * t_after)
    squashed = torch.tanh(after)
    return torch.stack((t_after, t_o * squashed + o * (1 - squashed * squashed) * t_after), dim=-2)


CELL = Cell(2, step, jacobian, back, moved)


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
    return gated_recurrence(CELL, u, (weight, peephole), (h0, c0), cu_seqlens, solver)


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
    """Gradient of :func:`lstm_recurrence`, from what it returned: d_u, d_weight, d_peephole, d_h0, d_c0."""
    needs = needs_u, needs_weights, needs_state
    weights, starts, states, d_states = (weight, peephole), (h0, c0), (h, c), (d_h, d_c)
    return gated_recurrence_backward(CELL, u, weights, starts, cu_seqlens, states, d_states, needs)
