"""Partial reconstructions of a code: by the first so many latents, or by the strongest of every token.

Each token's entries are cut into pieces, rows of their own to :func:`fastsparse.spmm`; sums of the pieces up
to each cut are the levels. That costs the arithmetic of one reconstruction, and (N, levels, D) of memory.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fastsparse.functional import Ragged, TopK, spmm


def by_prefix(
    code: Ragged | TopK, prefixes: Sequence[int], atoms: Tensor, bias: Tensor | None
) -> list[Tensor]:
    """(N, D) each by the latents below each of G prefixes, the last of them all, ascending.

    Source: Bussmann et al. 2025, "Learning Multi-Level Features with Matryoshka Sparse Autoencoders",
    arXiv 2503.17547.
    """
    if isinstance(code, TopK):
        code = Ragged.from_topk(code)
    M, N = atoms.shape[0], code.offsets.shape[0] - 1
    places = code.rows() * M + code.indices  # ascending
    begins = torch.tensor([0, *prefixes[:-1]], device=places.device)
    cuts = torch.arange(N, device=places.device).unsqueeze(1) * M + begins
    bounds = torch.cat([torch.searchsorted(places, cuts.reshape(-1)), code.offsets[-1:]])
    return _levels(code.values, code.indices, bounds, atoms, bias, len(prefixes))


def by_budget(code: TopK, budgets: Sequence[int], atoms: Tensor, bias: Tensor | None) -> list[Tensor]:
    """(N, D) each by the first so many entries of every token, of G budgets, ascending, the last of them all.

    Source: Gao et al. 2024, arXiv 2406.04093, appendix B (Multi-TopK); Balagansky et al. 2025, "Train One
    Sparse Autoencoder Across Multiple Sparsity Budgets", arXiv 2505.24473.
    """
    N, K = code.indices.shape
    begins = torch.tensor([0, *budgets[:-1]], device=code.indices.device)
    cuts = torch.arange(N, device=begins.device).unsqueeze(1) * K + begins
    bounds = torch.cat([cuts.reshape(-1), cuts.new_full((1,), N * K)])
    return _levels(code.values.flatten(), code.indices.flatten(), bounds, atoms, bias, len(budgets))


def _levels(
    values: Tensor, indices: Tensor, bounds: Tensor, atoms: Tensor, bias: Tensor | None, count: int
) -> list[Tensor]:
    pieces = spmm(values, indices, atoms, bounds).unflatten(0, (-1, count)).unbind(dim=1)
    first = pieces[0] if bias is None else pieces[0] + bias
    return list(accumulate(pieces[1:], initial=first))  # a cumsum's gradient passes thrice over all
