"""Ragged codes: entries ``offsets[n]`` up to ``offsets[n + 1]`` are token n's, those after them padding."""

import torch
from torch import Tensor


def tokens_of(offsets: Tensor, entries: int) -> Tensor:
    """(E,) int32, the token of every entry; N, which there is none of, for padding.

    Offsets that nobody has checked give no others, if wrong ones.
    """
    places = torch.arange(entries, device=offsets.device)
    return torch.searchsorted(offsets.contiguous()[1:], places, right=True, out_int32=True)
