"""TopK encoding: the k largest pre-activations of every token, and an activation (arXiv 2406.04093)."""

import torch
from torch import Tensor

from fastsparse.reference._precision import accumulate


def topk_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    activation: str = "relu",
    latent_scale: Tensor | None = None,
    latent_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x (N, D), weight (M, D), bias and latent_scale (M,), latent_mask (M,) bool; returns two (N, k)."""
    scores = accumulate(x) @ accumulate(weight).T  # (N, M)
    if bias is not None:
        scores = scores + accumulate(bias)
    indices = select(scores.detach(), k, activation, latent_scale, latent_mask)
    values = scores.gather(1, indices).to(x.dtype)
    if (
        activation == "relu"
    ):  # of what is returned: where rounding leaves 0 there is no gradient, as in F.relu
        values = torch.relu(values)
    return values, indices


def select(
    scores: Tensor, k: int, activation: str, latent_scale: Tensor | None, latent_mask: Tensor | None
) -> Tensor:
    """Indices of the k largest keys in descending order: eligible first, NaN largest, ties to the lowest."""
    keys = scores if latent_scale is None else scores * accumulate(latent_scale)
    if activation == "abs":
        keys = keys.abs()
    order = keys.sort(dim=1, descending=True, stable=True).indices  # PyTorch sorts NaN as the largest
    if latent_mask is not None:
        eligible = latent_mask[order]  # (N, M): a stable sort keeps the order of keys on either side
        order = order.gather(1, eligible.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices)
    return order[:, :k].contiguous()
