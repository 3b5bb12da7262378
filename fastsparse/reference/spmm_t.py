"""Transposed sparse code times dense matrix: ``out[m]`` sums ``values[n, j] * x[n]`` where indices are m."""

import torch.nn.functional as F
from torch import Tensor

from fastsparse.reference._precision import accumulate
from fastsparse.reference._ragged import rows_of


def spmm_t(
    values: Tensor, indices: Tensor, x: Tensor, num_latents: int, offsets: Tensor | None = None
) -> Tensor:
    """``S.T @ x``: values, indices (N, k), or (E,) with offsets (N + 1,); x (N, D)."""
    N, D = x.shape
    if offsets is None:
        contributions = accumulate(values).unsqueeze(-1) * accumulate(x).unsqueeze(1)  # (N, k, D)
        contributions = contributions.reshape(indices.numel(), D)
    else:
        rows = rows_of(offsets, indices.shape[0])
        padding = (rows == N).unsqueeze(-1)
        tokens = F.pad(accumulate(x), (0, 0, 0, 1))[rows]
        contributions = (accumulate(values).unsqueeze(-1) * tokens).masked_fill(padding, 0)  # (E, D)
    out = contributions.new_zeros(num_latents, D)
    return out.index_add(0, indices.reshape(indices.numel()), contributions).to(x.dtype)
