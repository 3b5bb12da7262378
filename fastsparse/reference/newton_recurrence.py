"""A recurrence of the user's own, h_t = step(h_{t-1}, x_t)."""

from collections.abc import Callable

from torch import Tensor

from fastsparse.reference.linear_recurrence import stacked


def newton_recurrence(step: Callable[[Tensor, Tensor], Tensor], x: Tensor, h0: Tensor) -> Tensor:
    """x (B, T, ...), h0 (B, ...); returns the states (B, T, ...): one step after the other.

    ``step`` works on any number of time steps at once, here on one: states (B, 1, ...), inputs (B, 1, ...).
    """
    h, states = h0.unsqueeze(1), []
    for t in range(x.shape[1]):
        h = step(h, x[:, t : t + 1])
        states.append(h.squeeze(1))
    return stacked(states, h0.unsqueeze(1)[:, :0])
