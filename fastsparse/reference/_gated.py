"""What the gated recurrences have in common, whose channels don't mix: a cell's step along time, and back.

The states of a channel, h, or h and c, are in a cell one, h (..., H), or a pair, (c, h) (..., 2, H).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsparse.reference._precision import accumulate
from fastsparse.reference._sequences import Sequences
from fastsparse.reference._solvers import Map, solve
from fastsparse.reference.linear_recurrence import adjoint


class Cell(NamedTuple):
    """A step and its derivatives, of a state, u (..., 3, H) and weights (rows, H), on any leading dimensions.

    Attributes:
        states: how many a channel has, 1 or 2.
        step: the next state.
        jacobian: its derivative in the state: (..., H), or (..., 2, 2, H), [i, j] being that of i in j.
        back: from ``through``, the gradient of the next state, that of the state, that of u, and what the
            step adds to that of each of the weights.
        moved: how much the next state moves where u and weights do, by what their tangents say.
    """

    states: int
    step: Callable[..., Tensor]
    jacobian: Callable[..., Tensor]
    back: Callable[..., tuple[Tensor, Tensor, tuple[Tensor, ...]]]
    moved: Callable[..., Tensor]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """(h,), or (h, c), as a cell has them."""
    return parts[0] if len(parts) == 1 else torch.stack(parts[::-1], dim=-2)


def apart(cell: Cell, state: Tensor) -> tuple[Tensor, ...]:
    """The other way round."""
    return (state,) if cell.states == 1 else tuple(part.contiguous() for part in state.unbind(-2)[::-1])


def gated_recurrence(
    cell: Cell,
    u: Tensor,
    weights: Sequence[Tensor],
    starts: Sequence[Tensor | None],
    cu_seqlens: Tensor | None,
    solver: str,
) -> tuple[Tensor, ...]:
    """u (B, T, 3, H), starts (S, H) or zeros; returns states (B, T, H) and passes (S, H) int32.

    S = B sequences, or those of ``cu_seqlens`` (S + 1,). The state is carried in fp32 (fp64 for fp64 inputs),
    and rounded where it is stored. What passes are: see ``solve``.
    """
    sequences = Sequences(cu_seqlens, u.shape[1])
    rows, wide = sequences.split(accumulate(u)), [accumulate(weight) for weight in weights]
    step, jacobian = (_given(function, wide) for function in (cell.step, cell.jacobian))
    states, passes = solve(Map(step, jacobian), rows, _start(rows, starts), solver)
    return *apart(cell, sequences.join(states).to(u.dtype)), passes


def gated_recurrence_backward(
    cell: Cell,
    u: Tensor,
    weights: Sequence[Tensor],
    starts: Sequence[Tensor | None],
    cu_seqlens: Tensor | None,
    states: Sequence[Tensor],
    d_states: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradient, from the states that were returned: of u, of the weights, and of the starts.

    What reaches a state in all is lambda_t = d_t + J_{t+1}^T lambda_{t+1}; the rest is the chain rule through
    one step, its gates computed again. What isn't needed comes out empty, of shape (0,).
    """
    sequences = Sequences(cu_seqlens, u.shape[1])
    d_states = [torch.zeros_like(states[0]) if part is None else part for part in d_states]
    rows, known, reaching = (
        sequences.split(accumulate(part)) for part in (u, joined(states), joined(d_states))
    )
    before = torch.cat((_start(rows, starts).unsqueeze(1), known), dim=1)[:, :-1]
    given = before, rows, *(accumulate(weight) for weight in weights)
    d_before, d_u, terms = cell.back(*given, adjoint(cell.jacobian(*given), reaching))
    d_starts = apart(cell, d_before[:, :1].sum(dim=1).to(u.dtype))  # zeros where there is no step
    needs_u, needs_weights, needs_starts = needs
    return (
        sequences.join(d_u).to(u.dtype) if needs_u else u.new_empty(0),
        *(term.sum(dim=(0, 1)).to(u.dtype) if needs_weights else u.new_empty(0) for term in terms),
        *(part if needs_starts else u.new_empty(0) for part in d_starts),
    )


def _given(function: Callable[..., Tensor], weights: Sequence[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda state, u: function(state, u, *weights)


def _start(rows: Tensor, starts: Sequence[Tensor | None]) -> Tensor:
    """The state before the first step."""
    zeros = rows.new_zeros(rows.shape[0], rows.shape[-1])
    return joined([zeros if start is None else accumulate(start) for start in starts])
