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
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """x (N, D), weight (M, D), bias and latent_scale (M,), latent_mask (M,) bool; returns two (N, groups k).

    The groups are equal and consecutive: latents [g M / groups, (g + 1) M / groups), one after the other.
    """
    scores = score(x, weight, bias)
    keys = keys_of(scores.detach(), activation, latent_scale)
    size, chosen = weight.shape[0] // groups, []
    for begin in range(0, groups * size, size) if size else ():
        mask = None if latent_mask is None else latent_mask[begin : begin + size]
        chosen.append(begin + select(keys[:, begin : begin + size], k, mask))
    indices = torch.cat(chosen, dim=1)
    return activate(scores.gather(1, indices), x.dtype, activation), indices


def score(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(N, M) pre-activations in the type that sums are carried in."""
    scores = accumulate(x) @ accumulate(weight).T
    return scores if bias is None else scores + accumulate(bias)


def keys_of(scores: Tensor, activation: str, latent_scale: Tensor | None) -> Tensor:
    """What latents are selected by."""
    keys = scores if latent_scale is None else scores * accumulate(latent_scale)
    return keys.abs() if activation == "abs" else keys


def select(keys: Tensor, k: int, mask: Tensor | None) -> Tensor:
    """Places of the k largest in descending order: eligible first, NaN largest, ties to the lowest."""
    order = keys.sort(dim=1, descending=True, stable=True).indices  # PyTorch sorts NaN as the largest
    if mask is not None:
        eligible = mask[order]  # (N, M): a stable sort keeps the order of keys on either side
        order = order.gather(1, eligible.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices)
    return order[:, :k].contiguous()


def activate(scores: Tensor, dtype: torch.dtype, activation: str) -> Tensor:
    """Selected scores as they are returned: where rounding leaves 0 there is no gradient, as in F.relu."""
    values = scores.to(dtype)
    return torch.relu(values) if activation == "relu" else values
