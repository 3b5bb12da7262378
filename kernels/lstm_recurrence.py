"""The diagonal LSTM in Triton; its solvers are those of every gated recurrence."""

from fastsparse.kernels._recurrence import gated_recurrence
from fastsparse.kernels._sequences import DTYPES as DTYPES
from torch import Tensor


def lstm_recurrence(
    u: Tensor,
    weight: Tensor,
    peephole: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    cu_seqlens: Tensor | None,
    solver: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """u (B, T, 3, H), weight (3, H), peephole (2, H), states (S, H); h and c (B, T, H), passes (S, H)."""
    return gated_recurrence("lstm", u, weight, peephole, h0, c0, cu_seqlens, solver)
