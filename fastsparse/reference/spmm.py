"""Sparse code times dense matrix: ``out[n] = sum_j values[n, j] * weight[indices[n, j]]``."""

from torch import Tensor

from fastsparse.reference._precision import accumulate


def spmm(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """``S @ weight``: values, indices (N, k); weight (M, D); returns (N, D)."""
    atoms = accumulate(weight)[indices]  # (N, k, D)
    return (accumulate(values).unsqueeze(-1) * atoms).sum(dim=1).to(weight.dtype)
