"""How well single latents tell concepts apart: histograms of their values, and what follows from them.

Jensen-Shannon separability and attenuation by posterior probabilities, after arXiv 2508.15094. Definitions
are ours where the paper leaves them open: tokens without a latent are a bin of its histogram of their own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastsparse._validation import check_count, check_tensor
from fastsparse.functional import BatchTopK, Pursuit, Ragged, TopK
from fastsparse.metrics._entries import Entries, entries_of


class Histograms(NamedTuple):
    """What :func:`concept_histograms` returns.

    Attributes:
        shares: (M, C, B + 1) float64, of a concept's tokens: those without the latent, then those with a
            value in each of B bins; they add up to 1.
        least: (M,) float64, where the first bin begins: at the latent's least value that isn't 0.
        width: (M,) float64, of a bin; 0 for latents with one value or none.
        weights: (C,) float64, how much each concept counts; they add up to 1.
    """

    shares: Tensor
    least: Tensor
    width: Tensor
    weights: Tensor


def concept_histograms(
    code: TopK | Ragged | BatchTopK | Pursuit,
    labels: Tensor,
    num_latents: int,
    *,
    num_concepts: int | None = None,
    bins: int = 16,
    weights: Tensor | None = None,
) -> Histograms:
    """Count every latent's values by concept.

    Args:
        code: of N tokens.
        labels: (N,) int64, the concept of each token, from 0 on.
        num_latents: M.
        num_concepts: C; default: as many as there are labels up to the largest.
        bins: of equal width, between a latent's least and largest nonzero value.
        weights: (C,) of the concepts; default: their shares of the tokens.

    Returns:
        :class:`Histograms`, O(M C B) of memory.

    Raises:
        TypeError, ValueError: a shape, dtype or range is wrong, there are fewer than two concepts, or one has
            no token.
        IndexError: the code holds latents that there are none of.
    """
    op = "concept_histograms"
    M, bins = check_count(op, "num_latents", num_latents, 1), check_count(op, "bins", bins, 1)
    entries = entries_of(op, code, M)
    check_tensor(op, "labels", labels)
    if labels.dtype != torch.int64 or labels.shape != (entries.num_tokens,):
        raise ValueError(
            f"{op}: labels must be int64 of shape (N,) = ({entries.num_tokens},), got "
            f"{str(labels.dtype)[6:]} of shape {tuple(labels.shape)}"
        )
    found = int(labels.amax()) + 1 if len(labels) else 0
    C = found if num_concepts is None else check_count(op, "num_concepts", num_concepts, 1)
    if C < 2:
        raise ValueError(f"{op}: there must be at least 2 concepts to tell apart, got {C}")
    if len(labels) and (int(labels.amin()) < 0 or found > C):
        raise ValueError(f"{op}: labels must be in [0, {C}), got {int(labels.amin())} to {found - 1}")
    tokens = torch.bincount(labels, minlength=C).double()
    if not (tokens > 0).all():
        raise ValueError(f"{op}: every concept must have a token, got none of {int(tokens.argmin())}")
    values = entries.values.double()
    least = values.new_full((M,), torch.inf).scatter_reduce_(0, entries.latents, values, "amin")
    most = values.new_full((M,), -torch.inf).scatter_reduce_(0, entries.latents, values, "amax")
    width = (most - least).clamp_min(0) / bins  # of none: -inf - inf
    least = torch.where(least < torch.inf, least, 0)
    places = _places(entries, least, width, bins)
    cells = (entries.latents * C + labels[entries.tokens]) * (bins + 1) + places
    counts = torch.bincount(cells, minlength=M * C * (bins + 1)).view(M, C, bins + 1).double()
    counts[..., 0] = tokens - counts.sum(dim=-1)
    shares = counts / tokens.unsqueeze(1)
    return Histograms(shares, least, width, _weights(op, weights, tokens))


def concept_separability(histograms: Histograms) -> Tensor:
    """Score how well each latent alone tells the concepts apart.

    The square root of the Jensen-Shannon divergence of the concepts' histograms, as a share of its largest
    value, the entropy of the weights.

    Args:
        histograms: of :func:`concept_histograms`.

    Returns:
        (M,) float64: 0 where all concepts have the same histogram, 1 where no two share a bin.

    Example:
        >>> import torch
        >>> from fastsparse import TopK
        >>> from fastsparse.metrics import concept_histograms, concept_separability
        >>> code = TopK(torch.tensor([[1.0, 1.0], [2.0, 0.0]]), torch.tensor([[0, 1], [0, 1]]))
        >>> concept_separability(concept_histograms(code, torch.tensor([0, 1]), 3)).tolist()
        [1.0, 1.0, 0.0]

    Source: Lin 1991, "Divergence measures based on the Shannon entropy"; after arXiv 2508.15094.
    """
    shares, weights = histograms.shares, histograms.weights
    together = torch.einsum("mcb,c->mb", shares, weights)
    entropies = torch.special.entr(shares).sum(dim=-1) @ weights
    divergence = torch.special.entr(together).sum(dim=-1) - entropies
    return (divergence / torch.special.entr(weights).sum()).clamp(0, 1).sqrt()


def concept_posterior(histograms: Histograms, code: TopK | Ragged | BatchTopK | Pursuit) -> Tensor:
    """Say, by Bayes' rule, how probable each concept is given a latent's value.

    Args:
        histograms: of :func:`concept_histograms`.
        code: of any tokens.

    Returns:
        (E, C) float64, for every entry of the code in the order of ``values.flatten()``; the concepts'
        weights for values that the histograms have not seen, as outside their bins.

    Raises:
        TypeError: code is no code.
        IndexError: the code holds latents that there are none of.
    """
    M, _, cells = histograms.shares.shape
    entries_of("concept_posterior", code, M)  # checks it
    latents, values = code.indices.flatten(), code.values.detach().flatten().double()
    every = Entries(latents, latents, values, 0)
    places = _places(every, histograms.least, histograms.width, cells - 1)
    joint = histograms.shares[latents, :, places] * histograms.weights
    total = joint.sum(dim=1, keepdim=True)
    return torch.where(total > 0, joint / total, histograms.weights)


def attenuate(
    histograms: Histograms, code: TopK | Ragged | BatchTopK | Pursuit, concept: int
) -> TopK | Ragged:
    """Weaken what speaks for a concept: every value by the probability of the concept given the value.

    ``f (1 - P(concept | f))``: a value that only this concept has goes to 0, one that says nothing about it
    loses the concept's weight.

    Args:
        histograms: of :func:`concept_histograms`.
        code: of any tokens.
        concept: which.

    Returns:
        The same entries with other values, differentiable in the code's: a ``Ragged`` for a ragged code, a
        ``TopK`` for others.

    Raises:
        TypeError, ValueError: code is no code, or there is no such concept.
        IndexError: the code holds latents that there are none of.
    """
    concept, C = check_count("attenuate", "concept", concept, 0), histograms.shares.shape[1]
    if concept >= C:
        raise ValueError(f"attenuate: concept must be below their number ({C}), got concept={concept}")
    keep = 1 - concept_posterior(histograms, code)[:, concept]
    code = code.code if isinstance(code, BatchTopK) else code
    values = code.values * keep.view_as(code.values).to(code.values.dtype)
    return Ragged(values, *code[1:]) if isinstance(code, Ragged) else TopK(values, code.indices)


def _places(entries: Entries, least: Tensor, width: Tensor, bins: int) -> Tensor:
    """(E,) int64: 0 for a value of 0, else 1 + its bin; values beyond the first and last bin are in these."""
    low, step = least[entries.latents], width[entries.latents]
    place = ((entries.values.double() - low) / torch.where(step > 0, step, 1)).floor()
    return torch.where(entries.values == 0, 0, 1 + place.nan_to_num(nan=0.0).clamp(0, bins - 1).long())


def _weights(op: str, weights: Tensor | None, tokens: Tensor) -> Tensor:
    if weights is None:
        return tokens / tokens.sum()
    check_tensor(op, "weights", weights)
    if weights.shape != tokens.shape or not weights.is_floating_point():
        raise ValueError(
            f"{op}: weights must be floating of shape (C,) = ({len(tokens)},), got "
            f"{str(weights.dtype)[6:]} of shape {tuple(weights.shape)}"
        )
    weights = weights.detach().double()
    if not ((weights > 0) & weights.isfinite()).all():
        raise ValueError(f"{op}: weights must be finite and above 0")
    return weights / weights.sum()
