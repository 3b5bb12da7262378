"""Dense times dense, sampled where the code is nonzero: ``out[n, j] = <x[n], weight[indices[n, j]]>``."""

import torch.nn.functional as F
from torch import Tensor

from fastsparse.reference._precision import accumulate
from fastsparse.reference._ragged import rows_of


def sddmm(x: Tensor, weight: Tensor, indices: Tensor, offsets: Tensor | None = None) -> Tensor:
    """``(x @ weight.T)`` at ``indices`` (N, k), or (E,) with offsets (N + 1,); x (N, D); weight (M, D).

    Returns what has the shape of ``indices``; 0 for padding.
    """
    atoms = accumulate(weight)[indices]  # (N, k, D) or (E, D)
    if offsets is None:
        return (accumulate(x).unsqueeze(1) * atoms).sum(dim=-1).to(x.dtype)
    rows = rows_of(offsets, indices.shape[0])
    tokens = F.pad(accumulate(x), (0, 0, 0, 1))[rows]  # a row of zeros for padding
    scores = (tokens * atoms).sum(dim=-1)
    return scores.masked_fill(rows == x.shape[0], 0).to(x.dtype)
