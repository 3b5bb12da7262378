"""What users call: validation, autocast and leading batch dimensions around the ops."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsparse import ops
from fastsparse._validation import (
    check_alike,
    check_code,
    check_count,
    check_device,
    check_flag,
    check_gram,
    check_indices,
    check_leading,
    check_mask,
    check_matrix,
    check_rows,
    check_tolerance,
    check_unit_norm,
    check_vector,
    is_plain_code,
)

ACTIVATIONS = ("relu", "none", "abs")
METHODS = ("auto", "direct", "gram")


class TopK(NamedTuple):
    """A sparse code: the nonzero entries of every row, largest first.

    Attributes:
        values: (..., k), the dtype of the encoder's input.
        indices: (..., k) int64, which latents.
    """

    values: Tensor
    indices: Tensor


class Pursuit(NamedTuple):
    """A sparse code by matching pursuit: the steps of every row, in order, and what they leave.

    Attributes:
        values: (..., k) coefficients, the dtype of the input; 0 in slots that a row didn't use.
        indices: (..., k) int64, which atoms; an atom may occur more than once. 0 in unused slots.
        residual: (..., D), the input less its reconstruction.
    """

    values: Tensor
    indices: Tensor
    residual: Tensor


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
    x, weight, bias, latent_scale = _autocast(x, weight, bias, latent_scale)
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
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"topk_encode: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"topk_encode: k must be an int, got {k!r} of type {type(k).__name__}")
    if not 1 <= k <= M:
        raise ValueError(
            f"topk_encode: k must be between 1 and the number of eligible latents ({M}), got k={k}"
        )
    values, indices = ops.topk_encode(_flat(x), weight, bias, k, activation, latent_scale, latent_mask)
    return TopK(_unflat(values, x), _unflat(indices, x))


def matching_pursuit(
    x: Tensor,
    dictionary: Tensor,
    *,
    k: int,
    tol: float = 0.0,
    nonnegative: bool = False,
    normalized: bool = False,
    method: str = "auto",
    coalesce: bool = False,
) -> Pursuit:
    """Encode every token greedily: k times take the atom that explains most of what is left of it.

    From ``r = x``, every step chooses the atom w with the largest ``|w @ r| / |w|`` and takes
    ``c = (w @ r) / |w|**2`` times it from r. Ties go to the lowest index, NaN counts as largest, and zero
    atoms are never chosen. Scores, coefficients and r are carried in fp32 (fp64 for fp64 inputs) through all
    steps, and rounded to the input's dtype at the end alone.

    A row stops when it has come to ``|r| <= tol`` (tol > 0), or when no atom would change it; k may exceed D.

    The gradient holds the choice of atoms constant and is exact otherwise. It goes back through the steps
    from the last residual, so that nothing is kept but the outputs. In bf16 and fp16 it starts from what was
    rounded, and is as accurate as these dtypes are.

    Args:
        x: (..., D) tokens; fp32, bf16, fp16 or fp64.
        dictionary: (M, D), M >= 1, one atom a row; the dtype of ``x``.
        k: how many steps at most, k >= 1.
        tol: the norm of the residual at which a row stops, in the unit of ``x``; 0 for never.
        nonnegative: choose the largest ``w @ r / |w|``, and stop a row where no atom has a positive one.
        normalized: a promise that all atoms have norm 1, which saves dividing by their norms, and makes them
            constant in the gradient. It is checked on the CPU, and on GPUs under ``FASTSPARSE_DEBUG=1``.
        method: ``"direct"`` multiplies the dictionary by the residuals in every step, ``"gram"`` once, and
            then keeps the scores up to date by rows of the Gram matrix (M, M) of the atoms. ``"auto"`` takes
            what is faster, and direct where the Gram matrix doesn't fit. The answer is the same.
        coalesce: merge the steps of a row that chose one atom: the first of them gets the sum of their
            coefficients, and the others become unused slots.

    Returns:
        :class:`Pursuit` ``(values, indices, residual)``, of shapes (..., k), (..., k) and (..., D). Gradients
        reach ``x`` and ``dictionary`` through values and residual; indices have none.

    Raises:
        TypeError: an argument is not a tensor, or of an unsupported dtype.
        ValueError: shapes, dtypes or devices don't match, k < 1, tol < 0, atoms promised to be of norm 1 are
            not, the method is unknown, or the Gram matrix that it needs doesn't fit into memory.
        RuntimeError: a backend was named that can't serve this call.

    Example:
        >>> import torch, fastsparse
        >>> dictionary = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> x = torch.tensor([[3.0, 8.0]])
        >>> values, indices, residual = fastsparse.matching_pursuit(x, dictionary, k=2)
        >>> values.tolist(), indices.tolist(), residual.tolist()
        ([[4.0, 3.0]], [[1, 0]], [[0.0, 0.0]])

    Source: Mallat & Zhang 1993, "Matching pursuits with time-frequency dictionaries"; as the encoder of an
    autoencoder Costa et al. 2025, arXiv 2506.03093, algorithm 1.
    """
    x, dictionary = _check_pursuit("matching_pursuit", "x", x, dictionary, nonnegative, normalized)
    check_count("matching_pursuit", "k", k, 1)
    check_tolerance("matching_pursuit", "tol", tol)
    check_flag("matching_pursuit", "coalesce", coalesce)
    if method not in METHODS:
        raise ValueError(f"matching_pursuit: method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "gram":
        check_gram("matching_pursuit", dictionary)
    values, indices, residual = ops.matching_pursuit(
        _flat(x), dictionary, k, tol, nonnegative, normalized, method
    )
    if coalesce:
        values, indices = _coalesced(values, indices)
    return Pursuit(_unflat(values, x), _unflat(indices, x), _unflat(residual, x))


def matching_pursuit_step(
    residual: Tensor, dictionary: Tensor, *, nonnegative: bool = False, normalized: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Take one step of :func:`matching_pursuit`, for loops of your own.

    Args:
        residual: (..., D), what is left of the tokens; fp32, bf16, fp16 or fp64.
        dictionary, nonnegative, normalized: as in :func:`matching_pursuit`.

    Returns:
        ``(value, index, residual)``: the coefficient (...), the atom (...) int64, and what is left then
        (..., D). Value 0 and index 0 where no step was to be taken. Gradients reach both inputs through value
        and residual.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`matching_pursuit`.

    Example:
        >>> import torch, fastsparse
        >>> value, index, left = fastsparse.matching_pursuit_step(torch.tensor([[3.0, -5.0]]), torch.eye(2))
        >>> value.tolist(), index.tolist(), left.tolist()
        ([-5.0], [1], [[3.0, 0.0]])

    Source: Mallat & Zhang 1993, equation 11; Costa et al. 2025, arXiv 2506.03093, algorithm 1.
    """
    residual, dictionary = _check_pursuit(
        "matching_pursuit_step", "residual", residual, dictionary, nonnegative, normalized
    )
    value, index, after = ops.matching_pursuit_step(_flat(residual), dictionary, nonnegative, normalized)
    if residual.dim() == 2:
        return value, index, after
    leading = residual.shape[:-1]
    return value.reshape(leading), index.reshape(leading), _unflat(after, residual)


def _check_pursuit(
    op: str, name: str, rows: Tensor, dictionary: Tensor, nonnegative: bool, normalized: bool
) -> tuple[Tensor, Tensor]:
    """The tensors as autocast wants them."""
    rows, dictionary = _autocast(rows, dictionary)
    M, D = check_matrix(op, "dictionary", dictionary)
    if M == 0:
        raise ValueError(f"{op}: dictionary must hold at least one atom, got shape {tuple(dictionary.shape)}")
    check_rows(op, name, rows, D)
    check_alike(op, ((name, rows), ("dictionary", dictionary)))
    check_flag(op, "nonnegative", nonnegative)
    check_flag(op, "normalized", normalized)
    if normalized:
        check_unit_norm(op, dictionary)
    return rows, dictionary


def _coalesced(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """A code (N, k) in which no atom occurs twice: its first slot holds the sum, its others 0 and index 0.

    Sums run over the equal neighbours of a row sorted by index, doubling their reach: log2(k) passes of a
    fixed order, without atomics.
    """
    k = indices.shape[1]
    ordered, order = indices.sort(dim=1, stable=True)
    sums = values.gather(1, order).to(torch.promote_types(values.dtype, torch.float32))
    reach = 1
    while reach < k:
        same = ordered[:, reach:] == ordered[:, :-reach]
        sums = sums + F.pad(torch.where(same, sums[:, reach:], 0), (0, reach))
        reach *= 2
    first = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
    back = order.argsort(dim=1)
    merged = torch.where(first, sums.to(values.dtype), 0)
    return merged.gather(1, back), ordered.masked_fill(~first, 0).gather(1, back)


def sparse_decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Decode sparse codes: ``out[n] = sum_j values[n, j] * weight[indices[n, j]] + bias``.

    Sums are carried in fp32 (fp64 for fp64 inputs). An index may occur more than once in a row.

    Args:
        values: (..., k) coefficients; fp32, bf16, fp16 or fp64.
        indices: (..., k) int64, each in [0, M).
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
    values, weight, bias = _autocast(values, weight, bias)
    out = _spmm("sparse_decode", values, indices, weight, bias)
    return out if bias is None else out + bias


def spmm(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """Multiply sparse codes with a dense matrix: ``out[n] = sum_j values[n, j] * weight[indices[n, j]]``.

    Args:
        values: (..., k); fp32, bf16, fp16 or fp64.
        indices: (..., k) int64, each in [0, M).
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
    values, weight = _autocast(values, weight)
    return _spmm("spmm", values, indices, weight, None)


def _spmm(op: str, values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None and is_plain_code(values, indices, weight):
        return ops.spmm(values, indices, weight)
    _, D = check_matrix(op, "weight", weight)
    check_code(op, values, indices)
    if bias is not None:
        check_vector(op, "bias", bias, "D", D)
    check_alike(op, (("values", values), ("weight", weight), ("bias", bias)))
    check_device(op, "indices", indices, "values", values)
    return _unflat(ops.spmm(_flat(values), _flat(indices), weight), values)


def sddmm(x: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """Score given latents only: ``out[n, j] = x[n] @ weight[indices[n, j]]``.

    Args:
        x: (..., D); fp32, bf16, fp16 or fp64.
        weight: (M, D), the dtype of ``x``.
        indices: (..., k) int64, each in [0, M); the leading dimensions of ``x``.

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
    x, weight = _autocast(x, weight)
    _, D = check_matrix("sddmm", "weight", weight)
    check_rows("sddmm", "x", x, D)
    check_indices("sddmm", indices)
    check_leading("sddmm", "x", x, indices)
    check_alike("sddmm", (("x", x), ("weight", weight)))
    check_device("sddmm", "indices", indices, "x", x)
    return _unflat(ops.sddmm(_flat(x), weight, _flat(indices)), indices)


def spmm_t(values: Tensor, indices: Tensor, x: Tensor, num_latents: int) -> Tensor:
    """Multiply transposed sparse codes with rows: sum ``values[n, j] * x[n]`` into ``out[indices[n, j]]``.

    The order of every sum is fixed: the result is bitwise reproducible, for any number of threads.

    Args:
        values: (..., k); fp32, bf16, fp16 or fp64.
        indices: (..., k) int64, each in [0, M).
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
    values, x = _autocast(values, x)
    check_code("spmm_t", values, indices)
    check_rows("spmm_t", "x", x, x.shape[-1] if isinstance(x, Tensor) and x.dim() else 0)
    check_leading("spmm_t", "x", x, indices)
    check_alike("spmm_t", (("values", values), ("x", x)))
    check_device("spmm_t", "indices", indices, "values", values)
    check_count("spmm_t", "num_latents", num_latents, 0)
    return ops.spmm_t(_flat(values), _flat(indices), _flat(x), num_latents)


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, the floating tensors in its dtype (fp64 stays, as in PyTorch's own autocast ops)."""
    if not torch._C._is_any_autocast_enabled():
        return tensors
    first = tensors[0]
    if not isinstance(first, Tensor) or first.is_meta or not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        tensor.to(dtype)
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    )


def _flat(tensor: Tensor) -> Tensor:
    """(..., X) as (N, X)."""
    return tensor if tensor.dim() == 2 else tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _unflat(tensor: Tensor, like: Tensor) -> Tensor:
    """(N, X) as (..., X) with the leading dimensions of ``like``."""
    return tensor if like.dim() == 2 else tensor.reshape(*like.shape[:-1], tensor.shape[-1])
