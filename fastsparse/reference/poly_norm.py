"""PolyNorm (Zhuo et al. 2024, arXiv 2411.03884): powers of a row, each over its own root mean square."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastsparse.reference._precision import accumulate

POWERS = (3, 2, 1)  # in the order of their weights


def poly_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x (N, D), weight (3), bias (1): y = sum_p weight_p s_p x^p + bias, s_p = (mean_d x^(2p) + eps)^-1/2.

    The weight of the cube is the first. Powers and sums are of fp32 (fp64 for fp64 inputs); y is rounded to
    the dtype of x.
    """
    terms = zip(accumulate(weight), powers(accumulate(x), eps), strict=True)
    return (sum(a * power for a, (power, _) in terms) + accumulate(bias)).to(x.dtype).contiguous()


def powers(x: Tensor, eps: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Of every power s_p x^p, and p s_p x^(p-1): its derivative as long as s_p stays as it is."""
    for p in POWERS:
        scale = torch.rsqrt((x**p).square().mean(dim=-1, keepdim=True) + eps)
        yield scale * x**p, p * scale * x ** (p - 1)


def poly_norm_backward(
    x: Tensor, weight: Tensor, eps: float, d_y: Tensor, needs_x: bool, needs_parameters: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of :func:`poly_norm`: d_x, d_weight, d_bias; what isn't needed is empty, of shape (0,).

    With y_p = s_p x^p and g = d_y the weights get sum g y_p. As s_p has the derivative -s_p^2 y_p p s_p
    x^(p-1) / D in x, x gets sum_p weight_p p s_p x^(p-1) (g - y_p mean_d(g y_p)).
    """
    g, d_x, d_weight = accumulate(d_y), 0, []
    for a, (power, slope) in zip(accumulate(weight), powers(accumulate(x), eps), strict=True):
        d_x = d_x + a * slope * (g - power * (g * power).mean(dim=-1, keepdim=True))
        d_weight.append((g * power).sum())
    return needed(x, d_x, d_weight, g, needs_x, needs_parameters)


def needed(
    x: Tensor, d_x: Tensor, d_weight: list[Tensor], d_y: Tensor, needs_x: bool, needs_parameters: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weights and bias, in the dtype of x; those that aren't needed are empty."""
    nothing = x.new_empty(0)
    return (
        d_x.to(x.dtype).contiguous() if needs_x else nothing,
        torch.stack(d_weight).to(x.dtype) if needs_parameters else nothing.clone(),
        d_y.sum().reshape(1).to(x.dtype) if needs_parameters else nothing.clone(),
    )
