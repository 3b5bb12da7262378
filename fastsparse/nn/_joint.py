"""Codes that several coders share: the largest entries of all of them together."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsparse.functional import BatchTopK, Ragged, TopK


def largest_in_rows(codes: Sequence[TopK], k: int) -> list[Ragged]:
    """Of the k largest of every coder in a row the k largest of them all, for each coder those of its own.

    Ties go to the first coder, then to the lowest latent; values count without their sign. The k largest of
    all are among the k largest of each.
    """
    sizes = torch.cat([code.values.detach().abs() for code in codes], dim=-1)
    chosen = sizes.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    kept = torch.zeros_like(sizes, dtype=torch.bool).scatter_(-1, chosen, True)
    found = []
    for code, mine in zip(codes, kept.chunk(len(codes), dim=-1), strict=True):
        order = code.indices.argsort(dim=-1)
        found.append(_kept(Ragged.from_topk(code), mine.gather(-1, order).flatten()))
    return found


def largest_in_batch(codes: Sequence[BatchTopK], total: int) -> list[BatchTopK]:
    """Of the largest of every coder in a batch the largest of them all, for each coder those of its own.

    Ties go to the first coder, then to the first token, then to the lowest latent. The threshold is that of
    all of them.
    """
    values = torch.cat([code.values.detach() for code in codes])
    widest = torch.stack([code.threshold for code in codes]).dtype
    ordered = values.to(widest).sort(descending=True, stable=True)
    kept = torch.zeros_like(values, dtype=torch.bool).index_fill_(0, ordered.indices[:total], True)
    parts = kept.split([len(code.values) for code in codes])
    threshold = ordered.values[total - 1]
    return [BatchTopK(*_kept(code.code, part), threshold) for code, part in zip(codes, parts, strict=True)]


def _kept(code: Ragged, kept: Tensor) -> Ragged:
    offsets = F.pad(kept.cumsum(0), (1, 0))[code.offsets]
    (places,) = kept.nonzero(as_tuple=True)
    return Ragged(code.values.index_select(0, places), code.indices[places], offsets)
