"""The diagonal GRU in Triton; its solvers are those of every gated recurrence."""

from fastsparse.kernels._recurrence import gated_recurrence
from fastsparse.kernels._sequences import DTYPES as DTYPES
from torch import Tensor


def gru_recurrence(
    u: Tensor, weight: Tensor, h0: Tensor | None, cu_seqlens: Tensor | None, solver: int
) -> tuple[Tensor, Tensor]:
    """u (B, T, 3, H), weight (3, H), h0 (S, H), cu_seqlens (S + 1,); h (B, T, H), passes (S, H) int32."""
    return gated_recurrence("gru", u, weight, None, h0, None, cu_seqlens, solver)
