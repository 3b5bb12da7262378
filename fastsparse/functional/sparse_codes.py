"""Sparse codes: TopK encoding, decoding, and the sparse products that these stand on."""

from typing import NamedTuple

from torch import Tensor

from fastsparse import ops
from fastsparse._options import ACTIVATIONS, position_of
from fastsparse._validation import (
    are_plain,
    check_alike,
    check_code,
    check_count,
    check_device,
    check_indices,
    check_leading,
    check_mask,
    check_matrix,
    check_rows,
    check_vector,
    whole_number,
)
from fastsparse.functional._tensors import autocast, flat, unflat

__all__ = ["TopK", "sddmm", "sparse_decode", "spmm", "spmm_t", "topk_encode"]


class TopK(NamedTuple):
    """A sparse code: the nonzero entries of every row, largest first.

    Attributes:
        values: (..., k), the dtype of the encoder's input.
        indices: (..., k) int64, which latents.
    """

    values: Tensor
    indices: Tensor


def topk_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    k: int,
    activation: str = "relu",
    latent_scale: Tensor | None = None,
    latent_mask: Tensor | None = None,
) -> TopK:
    """Encode every token as its k largest pre-activations, without the (N, M) matrix of all of them.

    The score of latent m for token n is ``x[n] @ weight[m] + bias[m]``, accumulated in fp32 (fp64 for fp64
    inputs). The k largest scores come out in descending order, ties to the lowest index, NaN as the largest;
    then the activation is applied. The result is exact and deterministic.

    Args:
        x: (..., D) tokens; fp32, bf16, fp16 or fp64.
        weight: (M, D) encoder, one latent a row, as in ``nn.Linear``; the dtype of ``x``.
        bias: (M,), the dtype of ``x``.
        k: how many latents to keep for each token, 1 <= k <= M.
        activation: ``"relu"`` (negative values become 0 and get no gradient), ``"none"``, or ``"abs"``
            (select on the absolute value, keep the sign).
        latent_scale: (M,) factors on the scores, for the selection alone.
        latent_mask: (M,) bool; latents where it is False are not eligible.

    Returns:
        :class:`TopK` ``(values, indices)``, both (..., k). Gradients reach ``x``, ``weight`` and ``bias``
        through the selected entries only; indices have none.

    Raises:
        TypeError: an argument is not a tensor, or of an unsupported dtype.
        ValueError: shapes, dtypes or devices don't match, k is out of range, or the activation is unknown.
        RuntimeError: a backend was named that can't serve this call.

    Example:
        >>> import torch, fastsparse
        >>> values, indices = fastsparse.topk_encode(torch.tensor([[3.0, 5.0, -1.0]]), torch.eye(3), k=2)
        >>> values.tolist(), indices.tolist()
        ([[5.0, 3.0]], [[1, 0]])

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", arXiv 2406.04093, section 2.3.
    """
    x, weight, bias, latent_scale = autocast(x, weight, bias, latent_scale)
    M, D = check_matrix("topk_encode", "weight", weight)
    check_rows("topk_encode", "x", x, D)
    if bias is not None:
        check_vector("topk_encode", "bias", bias, "M", M)
    if latent_scale is not None:
        check_vector("topk_encode", "latent_scale", latent_scale, "M", M)
    check_alike("topk_encode", (("x", x), ("weight", weight), ("bias", bias), ("latent_scale", latent_scale)))
    if latent_mask is not None:
        check_mask("topk_encode", "latent_mask", latent_mask, M)
        check_device("topk_encode", "latent_mask", latent_mask, "x", x)
    chosen = position_of("topk_encode", "activation", activation, ACTIVATIONS)
    k = whole_number("topk_encode", "k", k)
    if not 1 <= k <= M:
        raise ValueError(
            f"topk_encode: k must be between 1 and the number of eligible latents ({M}), got k={k}"
        )
    values, indices = ops.topk_encode(flat(x), weight, bias, k, chosen, latent_scale, latent_mask)
    return TopK(unflat(values, x), unflat(indices, x))


def sparse_decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Decode sparse codes: ``out[n] = sum_j values[n, j] * weight[indices[n, j]] + bias``.

    Sums are carried in fp32 (fp64 for fp64 inputs). An index may occur more than once in a row.

    Args:
        values: (..., k) coefficients; fp32, bf16, fp16 or fp64.
        indices: (..., k) int64 or int32, each in [0, M).
        weight: (M, D) decoder, one atom a row; the dtype of ``values``.
        bias: (D,), the dtype of ``values``.

    Returns:
        (..., D) reconstructions. Gradients reach values, weight and bias.

    Raises:
        TypeError: an argument is not a tensor, or of an unsupported dtype.
        ValueError: shapes, dtypes or devices don't match.
        IndexError: an index is outside [0, M).
        RuntimeError: a backend was named that can't serve this call.

    Example:
        >>> import torch, fastsparse
        >>> values, indices = torch.tensor([[2.0, 1.0]]), torch.tensor([[0, 2]])
        >>> fastsparse.sparse_decode(values, indices, torch.eye(3)).tolist()
        [[2.0, 0.0, 1.0]]

    Source: Gao et al. 2024, arXiv 2406.04093, equation 2.
    """
    values, weight, bias = autocast(values, weight, bias)
    out = _spmm("sparse_decode", values, indices, weight, bias)
    return out if bias is None else out + bias


def spmm(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """Multiply sparse codes with a dense matrix: ``out[n] = sum_j values[n, j] * weight[indices[n, j]]``.

    Args:
        values: (..., k); fp32, bf16, fp16 or fp64.
        indices: (..., k) int64 or int32, each in [0, M).
        weight: (M, D), the dtype of ``values``.

    Returns:
        (..., D), differentiable in values and weight.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`sparse_decode`.

    Example:
        >>> import torch, fastsparse
        >>> fastsparse.spmm(torch.tensor([[2.0]]), torch.tensor([[1]]), torch.eye(2)).tolist()
        [[0.0, 2.0]]

    Source: the SpMM of Gao et al. 2024, arXiv 2406.04093, appendix D.2.
    """
    values, weight = autocast(values, weight)
    return _spmm("spmm", values, indices, weight, None)


def _spmm(op: str, values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if are_plain(indices, values, weight) and values.shape == indices.shape:
        if bias is not None:
            check_vector(op, "bias", bias, "D", weight.shape[1])
            check_alike(op, (("values", values), ("bias", bias)))
        return ops.spmm(values, indices, weight)
    _, D = check_matrix(op, "weight", weight)
    indices = check_code(op, values, indices)
    if bias is not None:
        check_vector(op, "bias", bias, "D", D)
    check_alike(op, (("values", values), ("weight", weight), ("bias", bias)))
    check_device(op, "indices", indices, "values", values)
    return unflat(ops.spmm(flat(values), flat(indices), weight), values)


def sddmm(x: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """Score given latents only: ``out[n, j] = x[n] @ weight[indices[n, j]]``.

    Args:
        x: (..., D); fp32, bf16, fp16 or fp64.
        weight: (M, D), the dtype of ``x``.
        indices: (..., k) int64 or int32, each in [0, M); the leading dimensions of ``x``.

    Returns:
        (..., k), differentiable in x and weight.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`sparse_decode`.

    Example:
        >>> import torch, fastsparse
        >>> fastsparse.sddmm(torch.tensor([[3.0, 5.0]]), torch.eye(2), torch.tensor([[1, 0]])).tolist()
        [[5.0, 3.0]]

    Source: the SDDMM of Gao et al. 2024, arXiv 2406.04093, appendix D.2.
    """
    x, weight = autocast(x, weight)
    if are_plain(indices, x, weight) and x.shape[0] == indices.shape[0] and x.shape[1] == weight.shape[1]:
        return ops.sddmm(x, weight, indices)
    _, D = check_matrix("sddmm", "weight", weight)
    check_rows("sddmm", "x", x, D)
    indices = check_indices("sddmm", indices)
    check_leading("sddmm", "x", x, indices)
    check_alike("sddmm", (("x", x), ("weight", weight)))
    check_device("sddmm", "indices", indices, "x", x)
    return unflat(ops.sddmm(flat(x), weight, flat(indices)), indices)


def spmm_t(values: Tensor, indices: Tensor, x: Tensor, num_latents: int) -> Tensor:
    """Multiply transposed sparse codes with rows: sum ``values[n, j] * x[n]`` into ``out[indices[n, j]]``.

    The order of every sum is fixed: the result is bitwise reproducible, for any number of threads.

    Args:
        values: (..., k); fp32, bf16, fp16 or fp64.
        indices: (..., k) int64 or int32, each in [0, M).
        x: (..., D), the dtype and the leading dimensions of ``values``.
        num_latents: M.

    Returns:
        (M, D), differentiable in values and x.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`sparse_decode`.

    Example:
        >>> import torch, fastsparse
        >>> values, indices, x = torch.tensor([[2.0]]), torch.tensor([[1]]), torch.tensor([[3.0, 5.0]])
        >>> fastsparse.spmm_t(values, indices, x, 2).tolist()
        [[0.0, 0.0], [6.0, 10.0]]

    Source: the decoder's weight gradient in Gao et al. 2024, arXiv 2406.04093, appendix D.2.
    """
    values, x = autocast(values, x)
    indices = check_code("spmm_t", values, indices)
    check_rows("spmm_t", "x", x, x.shape[-1] if isinstance(x, Tensor) and x.dim() else 0)
    check_leading("spmm_t", "x", x, indices)
    check_alike("spmm_t", (("values", values), ("x", x)))
    check_device("spmm_t", "indices", indices, "values", values)
    num_latents = check_count("spmm_t", "num_latents", num_latents, 0)
    return ops.spmm_t(flat(values), flat(indices), flat(x), num_latents)
