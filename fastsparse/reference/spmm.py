"""Sparse code times dense matrix: ``out[n] = sum_j values[n, j] * weight[indices[n, j]]``."""

from torch import Tensor

from fastsparse.reference._precision import accumulate
from fastsparse.reference._ragged import rows_of


def spmm(values: Tensor, indices: Tensor, weight: Tensor, offsets: Tensor | None = None) -> Tensor:
    """``S @ weight``: values, indices (N, k), or (E,) with offsets (N + 1,); weight (M, D)."""
    terms = accumulate(values).unsqueeze(-1) * accumulate(weight)[indices]  # (N, k, D) or (E, D)
    if offsets is None:
        return terms.sum(dim=1).to(weight.dtype)
    N, D = offsets.shape[0] - 1, weight.shape[1]
    sums = terms.new_zeros(N + 1, D).index_add(0, rows_of(offsets, indices.shape[0]), terms)
    return sums[:N].to(weight.dtype)
