"""Rows of ragged codes: entries ``offsets[n]`` up to ``offsets[n + 1]``; those after the last are padding."""

import torch
from torch import Tensor


def rows_of(offsets: Tensor, entries: int) -> Tensor:
    """(E,) the row of every entry: N, which there is none of, for padding."""
    places = torch.arange(entries, device=offsets.device)
    return torch.searchsorted(offsets.contiguous(), places, right=True) - 1


def offsets_of(counts: Tensor) -> Tensor:
    """(N + 1,) where rows of so many entries begin and end."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
