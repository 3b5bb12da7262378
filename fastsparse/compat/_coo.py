"""Matrices of layout COO, coalesced, as codes."""

import torch
from torch import Tensor

from fastsparse.functional import Ragged


def ragged(matrix: Tensor) -> Ragged:
    """The entries of a matrix (N, M)."""
    rows, indices = matrix.indices()
    return Ragged(matrix.values(), indices, offsets_of(rows, len(matrix)))


def offsets_of(rows: Tensor, N: int) -> Tensor:
    """(N + 1,) of entries whose rows ascend."""
    return torch.searchsorted(rows.contiguous(), torch.arange(N + 1, device=rows.device))
