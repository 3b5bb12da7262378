"""The gradient of gru_recurrence; _recurrence_backward.py has the kernel."""

from fastsparse.kernels._recurrence_backward import recurrence_backward
from fastsparse.kernels._sequences import DTYPES
from torch import Tensor

__all__ = ["DTYPES", "gru_recurrence_backward"]


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
    """d_u (B, T, 3, H), d_weight (3, H), d_h0 (S, H) from h and d_h (B, T, H)."""
    needs = needs_u, needs_weight, needs_h0
    return recurrence_backward("gru", u, weight, None, (h0, None), cu_seqlens, (h, None), (d_h, None), *needs)
