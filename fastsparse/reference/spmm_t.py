"""Transposed sparse code times dense matrix: ``out[m]`` sums ``values[n, j] * x[n]`` where indices are m."""

from torch import Tensor

from fastsparse.reference._precision import accumulate


def spmm_t(values: Tensor, indices: Tensor, x: Tensor, num_latents: int) -> Tensor:
    """``S.T @ x``: values, indices (N, k); x (N, D); returns (M, D) with M = num_latents."""
    N, k = indices.shape
    D = x.shape[1]
    contributions = accumulate(values).unsqueeze(-1) * accumulate(x).unsqueeze(1)  # (N, k, D)
    out = contributions.new_zeros(num_latents, D)
    return out.index_add(0, indices.reshape(N * k), contributions.reshape(N * k, D)).to(x.dtype)
