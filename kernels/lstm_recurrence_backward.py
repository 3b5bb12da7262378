"""The gradient of lstm_recurrence; _recurrence_backward.py has the kernel."""

from fastsparse.kernels._recurrence_backward import recurrence_backward
from fastsparse.kernels._sequences import DTYPES
from torch import Tensor

__all__ = ["DTYPES", "lstm_recurrence_backward"]


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
    """d_u (B, T, 3, H), d_weight (3, H), d_peephole (2, H), d_h0 and d_c0 (S, H)."""
    needs = needs_u, needs_weights, needs_state
    return recurrence_backward("lstm", u, weight, peephole, (h0, c0), cu_seqlens, (h, c), (d_h, d_c), *needs)
