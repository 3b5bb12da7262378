"""Decoding by a polynomial: sparse sums of a few coordinates, and products of these."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsparse._validation import check_alike, check_matrix, check_vector, named
from fastsparse.functional._linear import linear
from fastsparse.functional._tensors import autocast
from fastsparse.functional.sparse_codes import sparse_decode

__all__ = ["polynomial_decode"]


def polynomial_decode(
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    coefficients: Sequence[Tensor],
    scales: Sequence[Tensor | float] | Tensor,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Decode sparse codes by a cubic polynomial, in which latents act together as well as alone.

    With ``a[n] = sum_j values[n, j] * weight[indices[n, j]]``, R1 coordinates, and powers taken one by one::

        out[n] = C_1 a + scales[0] * C_2 a[:R2]^2 + scales[1] * C_3 a[:R3]^3 + bias

    The code is never dense. Sums and powers are carried in fp32 (fp64 for fp64 inputs).

    Args:
        values: (..., k) coefficients of latents; fp32, bf16, fp16 or fp64. Of a ragged code (E,).
        indices: int64 or int32, each in [0, M); the shape of ``values``.
        weight: (M, R1), a row for every latent; the dtype of ``values``, as all that follow.
        coefficients: C_1 (D, R1), C_2 (D, R2), C_3 (D, R3), R1 >= R2 >= R3 >= 1.
        scales: of the second and the third power: two numbers, scalar tensors, or a tensor (2,).
        bias: (D,).
        offsets: of a ragged code: (N + 1,) int64, as in :func:`sparse_decode`.

    Returns:
        (..., D) reconstructions, (N, D) of a ragged code. Gradients reach all but indices and offsets.

    Raises:
        TypeError: an argument is not a tensor, or of an unsupported dtype.
        ValueError: shapes, dtypes or devices don't match, or ranks ascend.
        IndexError: an index is outside [0, M).

    Example:
        >>> import torch, fastsparse
        >>> values, indices = torch.tensor([[2.0, 1.0]]), torch.tensor([[0, 1]])
        >>> C = torch.eye(3)
        >>> fastsparse.polynomial_decode(values, indices, torch.eye(3), (C, C, C), (0.5, 0.0)).tolist()
        [[4.0, 1.5, 0.0]]

    Source: Koromilas et al. 2026, "PolySAE", arXiv 2602.01322.
    """
    op = "polynomial_decode"
    _check(op, weight, coefficients, scales)
    values, weight, bias, *coefficients = autocast(values, weight, bias, *coefficients)
    sums = sparse_decode(values, indices, weight, None, offsets)
    D = coefficients[0].shape[0]
    if bias is not None:
        check_vector(op, "bias", bias, "D", D)
    told = [(f"coefficients[{p}]", matrix) for p, matrix in enumerate(coefficients)]
    check_alike(op, (("values", values), *told, ("bias", bias)))
    out = polynomial(sums, coefficients, scales)
    return out if bias is None else out + bias


def polynomial(
    sums: Tensor, coefficients: Sequence[Tensor], scales: Sequence[Tensor | float] | Tensor
) -> Tensor:
    """Of coordinates (..., R1) the polynomial (..., D), without its bias, in their dtype."""
    sums, *coefficients = autocast(sums, *coefficients)
    wide = torch.promote_types(sums.dtype, torch.float32)  # a cube leaves fp16 at 40
    first, second, third = coefficients
    few = sums[..., : second.shape[1]].to(wide)
    with torch.autocast("cpu" if sums.is_meta else sums.device.type, enabled=False):
        powers = [scales[0] * few.square(), scales[1] * few[..., : third.shape[1]].pow(3)]
        products = linear(torch.cat(powers, dim=-1).to(wide), torch.cat([second, third], dim=1).to(wide))
        return (linear(sums, first.to(sums.dtype)) + products).to(sums.dtype)


def _check(op: str, weight: Tensor, coefficients: Sequence[Tensor], scales: Sequence[Tensor | float]) -> None:
    if isinstance(coefficients, Tensor) or len(coefficients) != 3:
        raise ValueError(f"{op}: coefficients must be three matrices, got {named(coefficients)}")
    if len(scales) != 2:
        raise ValueError(f"{op}: scales must be two numbers, got {len(scales)}")
    _, rank = check_matrix(op, "weight", weight)
    D = check_matrix(op, "coefficients[0]", coefficients[0])[0]
    shapes = [check_matrix(op, f"coefficients[{p}]", matrix) for p, matrix in enumerate(coefficients)]
    ranks = [shape[1] for shape in shapes]
    if ranks[0] != rank or not ranks[0] >= ranks[1] >= ranks[2] >= 1 or any(s[0] != D for s in shapes):
        raise ValueError(
            f"{op}: coefficients must have shapes (D, R1), (D, R2), (D, R3), R1 = {rank} >= R2 >= R3 >= 1, "
            f"got shapes {', '.join(str(tuple(shape)) for shape in shapes)}"
        )
