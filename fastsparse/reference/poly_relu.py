"""PolyReLU (Zhuo et al. 2024, arXiv 2411.03884): a polynomial of degree 3 in relu(x)."""

import torch
from torch import Tensor

from fastsparse.reference._precision import accumulate
from fastsparse.reference.poly_norm import POWERS, needed


def poly_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (N, D), weight (3), bias (1): y = sum_p weight_p relu(x)^p + bias, the cube's weight first.

    Powers are of fp32 (fp64 for fp64 inputs); y is rounded to the dtype of x. NaN stays NaN.
    """
    relu = accumulate(x).relu()
    terms = zip(accumulate(weight), POWERS, strict=True)
    return (sum(a * relu**p for a, p in terms) + accumulate(bias)).to(x.dtype).contiguous()


def poly_relu_backward(
    x: Tensor, weight: Tensor, d_y: Tensor, needs_x: bool, needs_parameters: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of :func:`poly_relu`: d_x, d_weight, d_bias; what isn't needed is empty, of shape (0,).

    What is at most 0 gets 0, whatever comes back to it.
    """
    relu, g = accumulate(x).relu(), accumulate(d_y)
    d_weight = [(g * relu**p).sum() for p in POWERS]
    d_x = moved(accumulate(x), accumulate(weight), g)
    return needed(x, d_x, d_weight, g, needs_x, needs_parameters)


def moved(x: Tensor, weight: Tensor, by: Tensor) -> Tensor:
    """dy / dx ``by``: sum_p weight_p p x^(p-1) of that where x is above 0, or NaN."""
    slope = sum(a * (p * x.relu() ** (p - 1)) for a, p in zip(weight, POWERS, strict=True))
    return torch.where(x <= 0, 0.0, slope * by)
