"""The GRU of ParaRNN (Danieli et al. 2025, arXiv 2510.21450), whose recurrence doesn't mix channels."""

import torch
from torch import Tensor

from fastsparse.reference._gated import Cell, gated_recurrence, gated_recurrence_backward


def gates(h: Tensor, u: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Update, reset and candidate, each (..., H), from h (..., H), u (..., 3, H), weight (3, H)."""
    (u_z, u_r, u_n), (w_z, w_r, w_n) = u.unbind(-2), weight.unbind(0)
    z = torch.sigmoid(w_z * h + u_z)
    r = torch.sigmoid(w_r * h + u_r)
    n = torch.tanh(w_n * h * r + u_n)
    return z, r, n


def step(h: Tensor, u: Tensor, weight: Tensor) -> Tensor:
    """The next state."""
    z, _, n = gates(h, u, weight)
    return (1 - z) * h + z * n


def jacobian(h: Tensor, u: Tensor, weight: Tensor) -> Tensor:
    """The derivative of the next state in h, a number for every channel."""
    z, r, n = gates(h, u, weight)
    w_z, w_r, w_n = weight.unbind(0)
    d_z, d_r, d_n = z * (1 - z), r * (1 - r), 1 - n * n
    return (1 - z) + (n - h) * d_z * w_z + z * d_n * w_n * (r + h * d_r * w_r)


def back(h: Tensor, u: Tensor, weight: Tensor, through: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor]]:
    """The gradients of h and u, and what the step adds to that of weight."""
    z, r, n = gates(h, u, weight)
    d_n = through * z * (1 - n * n)
    d_z = through * (n - h) * z * (1 - z)
    d_r = d_n * weight[2] * h * r * (1 - r)
    d_weight = torch.stack((d_z * h, d_r * h, d_n * r * h), dim=-2)
    return jacobian(h, u, weight) * through, torch.stack((d_z, d_r, d_n), dim=-2), (d_weight,)


def moved(h: Tensor, u: Tensor, weight: Tensor, t_u: Tensor, t_weight: Tensor) -> Tensor:
    """How much the next state moves with u and weight."""
    z, r, n = gates(h, u, weight)
    t_z, t_r, t_n = (t_u + t_weight * torch.stack((h, h, h * r), dim=-2)).unbind(-2)
    t_n = t_n + weight[2] * h * r * (1 - r) * t_r
    return (n - h) * z * (1 - z) * t_z + z * (1 - n * n) * t_n


CELL = Cell(1, step, jacobian, back, moved)


def gru_recurrence(
    u: Tensor,
    weight: Tensor,
    h0: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    solver: str = "sequential",
) -> tuple[Tensor, Tensor]:
    """u (B, T, 3, H), weight (3, H), h0 (S, H) or zeros; returns h (B, T, H) and passes (S, H) int32.

    The recurrence is :func:`step`; all else stands in :func:`fastsparse.reference._gated.gated_recurrence`.
    """
    return gated_recurrence(CELL, u, (weight,), (h0,), cu_seqlens, solver)


def gru_recurrence_backward(
    u: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    cu_seqlens: Tensor | None,
    h: Tensor,
    d_h: Tensor,
    needs_u: bool,
    needs_weight: bool,
    needs_h0: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of :func:`gru_recurrence`, from the states h that it returned: d_u, d_weight, d_h0."""
    needs = needs_u, needs_weight, needs_h0
    return gated_recurrence_backward(CELL, u, (weight,), (h0,), cu_seqlens, (h,), (d_h,), needs)
