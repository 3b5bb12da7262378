"""BatchTopK encoding: the largest pre-activations of a batch, and an activation (arXiv 2412.06410)."""

import torch
from torch import Tensor

from fastsparse.reference.topk_encode import activate, keys_of, score, select


def batch_topk_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    total: int,
    activation: str = "relu",
    latent_scale: Tensor | None = None,
    latent_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (N, D), weight (M, D), bias and latent_scale (M,), latent_mask (M,) bool.

    Returns values (total,), indices (total,), ascending in a row, offsets (N + 1,), and the smallest key that
    was selected (), in the type of the sums. Ties go to the lowest row, then to the lowest latent.
    """
    N, M = x.shape[0], weight.shape[0]
    scores = score(x, weight, bias)
    keys = keys_of(scores.detach(), activation, latent_scale).reshape(1, N * M)
    mask = None if latent_mask is None else latent_mask.repeat(N)
    chosen = select(keys, total, mask)[0]
    threshold = keys[0].gather(0, chosen[-1:]).squeeze(0)
    places = chosen.sort().values
    values = activate(scores.reshape(N * M)[places], x.dtype, activation)
    bounds = torch.arange(N + 1, device=x.device) * M
    return values, places % M, torch.searchsorted(places, bounds), threshold
