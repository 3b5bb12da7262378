"""PolyNorm as a module."""

import torch
from torch import Tensor

from fastsparse._validation import check_tolerance
from fastsparse.functional import poly_norm
from fastsparse.nn._polynomial_activation import PolynomialActivation


class PolyNorm(PolynomialActivation):
    """A feed-forward layer's activation by normalised powers: see :func:`fastsparse.poly_norm`.

    Nothing but its inputs is kept for the gradient, so that it needs no checkpoint around it.

    Args:
        eps: what is added to the mean squares, finite and at least 0.
        device, dtype: of the parameters.

    Attributes:
        weight: (3,), a third each at first; that of the cube first.
        bias: (1,), 0 at first.

    Raises:
        TypeError, ValueError: eps is no number, or negative or not finite.

    Example:
        >>> import torch
        >>> from fastsparse.nn import PolyNorm
        >>> feed_forward = torch.nn.Sequential(torch.nn.Linear(16, 64), PolyNorm(), torch.nn.Linear(64, 16))
        >>> feed_forward(torch.randn(4, 10, 16)).shape
        torch.Size([4, 10, 16])

    Source: Zhuo et al. 2024, "Polynomial Composition Activations: Unleashing the Dynamics of Large Language
    Models", arXiv 2411.03884.
    """

    def __init__(
        self,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_tolerance("PolyNorm", "eps", eps)
        super().__init__(device, dtype)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D), the dtype of the parameters, to y of its shape."""
        return poly_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"
