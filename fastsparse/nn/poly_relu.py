"""PolyReLU as a module."""

import torch
from torch import Tensor

from fastsparse.functional import poly_relu
from fastsparse.nn._polynomial_activation import PolynomialActivation


class PolyReLU(PolynomialActivation):
    """A feed-forward layer's activation by a polynomial in relu(x): see :func:`fastsparse.poly_relu`.

    Args:
        device, dtype: of the parameters.

    Attributes:
        weight: (3,), a third each at first; that of the cube first.
        bias: (1,), 0 at first.

    Example:
        >>> import torch
        >>> from fastsparse.nn import PolyReLU
        >>> PolyReLU()(torch.tensor([-1.0, 0.0, 3.0])).tolist()
        [0.0, 0.0, 13.0]

    Source: Zhuo et al. 2024, "Polynomial Composition Activations: Unleashing the Dynamics of Large Language
    Models", arXiv 2411.03884.
    """

    def __init__(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D), the dtype of the parameters, to y of its shape."""
        return poly_relu(x, self.weight, self.bias)
