"""Polynomial activations: PolyNorm and PolyReLU, whose coefficients are learnt."""

from torch import Tensor

from fastsparse import ops
from fastsparse._validation import check_alike, check_float, check_tolerance, check_vector
from fastsparse.functional._tensors import autocast, flat, unflat

__all__ = ["poly_norm", "poly_relu"]


def poly_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Weigh the first three powers of a row, each divided by its own root mean square.

    With the mean over the last axis, ``x / rms(x)`` standing for ``x * (mean(x ** 2) + eps) ** -0.5``::

        y = weight[0] * x**3 / rms(x**3) + weight[1] * x**2 / rms(x**2) + weight[2] * x / rms(x) + bias

    The row is read and y written once, and nothing but x is kept for the gradient. Powers and sums are of
    fp32 (fp64 for fp64 inputs): x^6 would leave fp16 at |x| = 6.3, and leaves fp32 at 2.6e6.

    Args:
        x: (..., D), D at least 1; fp32, bf16, fp16 or fp64.
        weight: (3,), that of the cube first; the dtype of ``x``.
        bias: (1,), the dtype of ``x``.
        eps: what is added to the mean squares, finite and at least 0. It decides where |x| is below 0.1,
            whose sixth power it is.

    Returns:
        y, of the shape and dtype of ``x``. Gradients reach x, weight and bias; sums over tokens have the same
        order on any number of threads. NaN and infinities stay in their rows.

    Raises:
        TypeError: an argument is not a tensor, or of an unsupported dtype.
        ValueError: shapes, dtypes or devices don't match, x has no features, or eps is negative or not
            finite.
        RuntimeError: a backend was named that can't serve this call.
        NotImplementedError: by second derivatives, which the reference has and the kernels have not.

    Example:
        >>> import torch, fastsparse
        >>> x = torch.tensor([[3.0, -3.0, 3.0, -3.0]])
        >>> fastsparse.poly_norm(x, torch.tensor([1.0, 2.0, 3.0]), torch.ones(1)).round(decimals=3).tolist()
        [[7.0, -1.0, 7.0, -1.0]]

    Source: Zhuo et al. 2024, "Polynomial Composition Activations: Unleashing the Dynamics of Large Language
    Models", arXiv 2411.03884.
    """
    x, weight, bias = autocast(x, weight, bias)
    _check("poly_norm", x, weight, bias)
    if x.shape[-1] == 0:
        raise ValueError(f"poly_norm: x must have at least one feature, got shape {tuple(x.shape)}")
    check_tolerance("poly_norm", "eps", eps)
    return unflat(ops.poly_norm(flat(x), weight, bias, eps), like=x)


def poly_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Take a polynomial of degree 3 in relu(x), entry by entry.

    In the order of :func:`poly_norm`, with ``r = relu(x)``::

        y = weight[0] * r**3 + weight[1] * r**2 + weight[2] * r + bias

    Args:
        x: (..., D); fp32, bf16, fp16 or fp64. Powers are of fp32 (fp64 for fp64).
        weight: (3,), that of the cube first; the dtype of ``x``.
        bias: (1,), the dtype of ``x``.

    Returns:
        y, of the shape and dtype of ``x``; NaN where x is. Gradients reach x, where it is above 0, weight and
        bias, whose sums have one order on any number of threads.

    Raises:
        TypeError: an argument is not a tensor, or of an unsupported dtype.
        ValueError: shapes, dtypes or devices don't match.
        RuntimeError: a backend was named that can't serve this call.
        NotImplementedError: by second derivatives, which the reference has and the kernels have not.

    Example:
        >>> import torch, fastsparse
        >>> x = torch.tensor([[-1.0, 0.0, 2.0]])
        >>> fastsparse.poly_relu(x, torch.tensor([1.0, 0.5, 3.0]), torch.ones(1)).tolist()
        [[1.0, 1.0, 17.0]]

    Source: Zhuo et al. 2024, "Polynomial Composition Activations: Unleashing the Dynamics of Large Language
    Models", arXiv 2411.03884.
    """
    x, weight, bias = autocast(x, weight, bias)
    _check("poly_relu", x, weight, bias)
    return unflat(ops.poly_relu(flat(x), weight, bias), like=x)


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    check_float(op, "x", x)
    if x.dim() < 1:
        raise ValueError(f"{op}: x must have shape (..., D), got a scalar")
    check_vector(op, "weight", weight, "3", 3)
    check_vector(op, "bias", bias, "1", 1)
    check_alike(op, (("x", x), ("weight", weight), ("bias", bias)))
