"""Dense times dense, sampled where the code is nonzero: ``out[n, j] = <x[n], weight[indices[n, j]]>``."""

from torch import Tensor

from fastsparse.reference._precision import accumulate


def sddmm(x: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """``(x @ weight.T)`` at ``indices``: x (N, D); weight (M, D); indices (N, k); returns (N, k)."""
    atoms = accumulate(weight)[indices]  # (N, k, D)
    return (accumulate(x).unsqueeze(1) * atoms).sum(dim=-1).to(x.dtype)
