"""The GRU of ParaRNN (Danieli et al. 2025, arXiv 2510.21450), whose recurrence doesn't mix channels."""

from functools import partial

import torch
from torch import Tensor

from fastsparse.reference._precision import accumulate
from fastsparse.reference._sequences import Sequences
from fastsparse.reference._solvers import Cell, solve
from fastsparse.reference.linear_recurrence import adjoint


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


def gru_recurrence(
    u: Tensor,
    weight: Tensor,
    h0: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    solver: str = "sequential",
) -> tuple[Tensor, Tensor]:
    """u (B, T, 3, H), weight (3, H), h0 (S, H) or zeros; returns h (B, T, H) and passes (S, H) int32.

    The recurrence is :func:`step`, along S = B sequences, or those of ``cu_seqlens`` (S + 1,). The state is
    carried in fp32 (fp64 for fp64 inputs), and rounded where it is stored. What passes are: see ``solve``.
    """
    sequences = Sequences(cu_seqlens, u.shape[1])
    rows, weight = sequences.split(accumulate(u)), accumulate(weight)
    start = rows.new_zeros(rows.shape[0], rows.shape[-1]) if h0 is None else accumulate(h0)
    cell = Cell(partial(step, weight=weight), partial(jacobian, weight=weight))
    h, passes = solve(cell, rows, start, solver)
    return sequences.join(h).to(u.dtype), passes


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
    """Gradient of :func:`gru_recurrence`, from the states h that it returned: d_u, d_weight, d_h0.

    What reaches a state in all is lambda_t = d_h_t + J_{t+1} lambda_{t+1}; the rest is the chain rule through
    one step, its gates computed again. What isn't needed comes out empty, of shape (0,).
    """
    sequences = Sequences(cu_seqlens, u.shape[1])
    rows, states, d_states = (sequences.split(accumulate(tensor)) for tensor in (u, h, d_h))
    start = rows.new_zeros(rows.shape[0], rows.shape[-1]) if h0 is None else accumulate(h0)
    before = torch.cat((start.unsqueeze(1), states), dim=1)[:, :-1]
    wide = accumulate(weight)
    z, r, n = gates(before, rows, wide)
    J = jacobian(before, rows, wide)
    through = adjoint(J, d_states)
    d_n = through * z * (1 - n * n)
    d_z = through * (n - before) * z * (1 - z)
    d_r = d_n * wide[2] * before * r * (1 - r)
    empty = u.new_empty(0)
    d_u = sequences.join(torch.stack((d_z, d_r, d_n), dim=-2)).to(u.dtype) if needs_u else empty
    d_weight, d_h0 = empty.clone(), empty.clone()
    if needs_weight:
        terms = torch.stack((d_z * before, d_r * before, d_n * r * before), dim=-2)
        d_weight = terms.sum(dim=(0, 1)).to(weight.dtype)
    if needs_h0:
        d_h0 = (J * through)[:, :1].sum(dim=1).to(u.dtype)  # zeros where there is no step
    return d_u, d_weight, d_h0
