"""The gradient of PolyReLU, in two passes over blocks of rows (_polynomials.py)."""

from fastsparse.kernels._polynomials import DTYPES, backward
from torch import Tensor

__all__ = ["DTYPES", "poly_relu_backward"]


def poly_relu_backward(
    x: Tensor, weight: Tensor, d_y: Tensor, needs_x: bool, needs_parameters: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """d_x (N, D), d_weight (3) and d_bias (1), empty where they aren't needed."""
    return backward(x, weight, None, d_y, needs_x, needs_parameters)
