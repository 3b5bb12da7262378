"""Sparse codes: TopK encoding, decoding, and the sparse products that these stand on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsparse import ops
from fastsparse._options import ACTIVATIONS, position_of
from fastsparse._validation import (
    are_plain,
    check_alike,
    check_code,
    check_count,
    check_device,
    check_groups,
    check_indices,
    check_leading,
    check_mask,
    check_matrix,
    check_ragged,
    check_rows,
    check_tolerance,
    check_vector,
    named,
    told_bound,
    whole_number,
)
from fastsparse.functional._tensors import autocast, flat, unflat
from fastsparse.functional.codes import BatchTopK, Ragged, TopK

__all__ = [
    "batch_topk_encode", "sddmm", "sparse_decode", "spmm", "spmm_t", "threshold_encode", "topk_encode",
]  # fmt: skip


def topk_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    k: int,
    activation: str = "relu",
    latent_scale: Tensor | None = None,
    latent_mask: Tensor | None = None,
    groups: int = 1,
) -> TopK:
    """Encode every token as its k largest pre-activations, without the (N, M) matrix of all of them.

    The score of latent m for token n is ``x[n] @ weight[m] + bias[m]``, accumulated in fp32 (fp64 for fp64
    inputs). The k largest scores come out in descending order, ties to the lowest index, NaN as the largest;
    then the activation is applied. The result is exact and deterministic.

    Args:
        x: (..., D) tokens; fp32, bf16, fp16 or fp64.
        weight: (M, D) encoder, one latent a row, as in ``nn.Linear``; the dtype of ``x``.
        bias: (M,), the dtype of ``x``.
        k: how many latents to keep for each token and group, 1 <= k <= M / groups.
        activation: ``"relu"`` (negative values become 0 and get no gradient), ``"none"``, or ``"abs"``
            (select on the absolute value, keep the sign).
        latent_scale: (M,) factors on the scores, for the selection alone.
        latent_mask: (M,) bool; latents where it is False are not eligible.
        groups: how many equal groups the latents are in, one after the other, of each of which k are kept.

    Returns:
        :class:`TopK` ``(values, indices)``, both (..., k), or (..., groups k), group by group. Gradients
        reach ``x``, ``weight`` and ``bias`` through the selected entries only; indices have none.

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
    M, chosen = _check_encoder("topk_encode", x, weight, bias, activation, latent_scale, latent_mask)
    groups = check_count("topk_encode", "groups", groups, 1)
    check_groups("topk_encode", weight, groups)
    k = whole_number("topk_encode", "k", k)
    if not 1 <= k <= M // groups:
        raise ValueError(
            f"topk_encode: k must be between 1 and {told_bound(1, M // groups, groups)}, got k={k}"
        )
    values, indices = ops.topk_encode(flat(x), weight, bias, k, chosen, latent_scale, latent_mask, groups)
    return TopK(unflat(values, x), unflat(indices, x))


def batch_topk_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    total: int,
    activation: str = "relu",
    latent_scale: Tensor | None = None,
    latent_mask: Tensor | None = None,
) -> BatchTopK:
    """Encode a batch as the largest of all its tokens' pre-activations, without the (N, M) matrix of these.

    The score of latent m for token n is ``x[n] @ weight[m] + bias[m]``, accumulated in fp32 (fp64 for fp64
    inputs). The ``total`` largest scores of the batch are kept, ties to the first token and then to the
    lowest index, NaN as the largest; then the activation is applied. The result is exact and deterministic;
    it depends on what else is in the batch.

    Args:
        x: (..., D) tokens; fp32, bf16, fp16 or fp64.
        weight: (M, D) encoder, one latent a row, as in ``nn.Linear``; the dtype of ``x``.
        bias: (M,), the dtype of ``x``.
        total: how many entries to keep, between 1 and N M: for k a token on average ``k * N``.
        activation: ``"relu"`` (negative values become 0 and get no gradient), ``"none"``, or ``"abs"``
            (select on the absolute value, keep the sign).
        latent_scale: (M,) factors on the scores, for the selection alone.
        latent_mask: (M,) bool; latents where it is False are not eligible.

    Returns:
        :class:`BatchTopK` ``(values, indices, offsets, threshold)`` of ``total`` entries, the latents of each
        token in ascending order. Gradients reach ``x``, ``weight`` and ``bias`` through these entries only;
        indices, offsets and threshold have none.

    Raises:
        TypeError: an argument is not a tensor, or of an unsupported dtype; total is not an int.
        ValueError: shapes, dtypes or devices don't match, total is out of range, or the activation is
            unknown.
        RuntimeError: a backend was named that can't serve this call.

    Example:
        >>> import torch, fastsparse
        >>> x = torch.tensor([[3.0, 5.0, -1.0], [1.0, 2.0, 0.5]])
        >>> code = fastsparse.batch_topk_encode(x, torch.eye(3), total=3)
        >>> code.values.tolist(), code.indices.tolist(), code.offsets.tolist(), code.threshold.item()
        ([3.0, 5.0, 2.0], [0, 1, 1], [0, 2, 3], 2.0)

    Source: Bussmann et al. 2024, "BatchTopK Sparse Autoencoders", arXiv 2412.06410.
    """
    x, weight, bias, latent_scale = autocast(x, weight, bias, latent_scale)
    M, chosen = _check_encoder("batch_topk_encode", x, weight, bias, activation, latent_scale, latent_mask)
    x, total = flat(x), whole_number("batch_topk_encode", "total", total)
    N = x.shape[0]
    if not 1 <= total <= N * M:
        raise ValueError(
            f"batch_topk_encode: total must be between 1 and {told_bound(N, M)}, got total={total}"
        )
    return BatchTopK(*ops.batch_topk_encode(x, weight, bias, total, chosen, latent_scale, latent_mask))


def threshold_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    threshold: Tensor | float = 0.0,
    margin: float = 0.0,
    activation: str = "none",
    latent_mask: Tensor | None = None,
    max_entries: int | None = None,
) -> Ragged:
    """Encode every token as its pre-activations above a threshold, without the (N, M) matrix of all of them.

    The score of latent m for token n is ``x[n] @ weight[m] + bias[m]``, accumulated in fp32 (fp64 for fp64
    inputs). Every score comes out that is not at most ``threshold[m] - margin``, and NaN, so that it
    surfaces: exactly these, and deterministically, though backends may differ in scores that are within the
    rounding of such a sum of their threshold. Memory grows with what comes out.

    Args:
        x: (..., D) tokens; fp32, bf16, fp16 or fp64.
        weight: (M, D) encoder, one latent a row, as in ``nn.Linear``; the dtype of ``x``.
        bias: (M,), the dtype of ``x``.
        threshold: (M,) floating, or one number for all; infinity for a latent that is off, minus infinity for
            one that is always on. No gradient reaches it: what is straight-through is a function of the
            entries that come out.
        margin: how far below its threshold a score comes out yet; at least 0.
        activation: ``"none"``, or ``"abs"`` (compare the absolute value, keep the sign).
        latent_mask: (M,) bool; latents where it is False are not eligible.
        max_entries: how many entries to make room for, which lets the shapes be known beforehand: for CUDA
            graphs, torch.compile and vmap. Places that are left are filled up with value 0 and index 0,
            behind the last row.

    Returns:
        :class:`Ragged` ``(values, indices, offsets)``, the latents of each token in ascending order. The
        values are the scores themselves, in the type that sums are carried in: fp32, or fp64 of fp64.
        Gradients reach ``x``, ``weight`` and ``bias`` through these entries only.

    Raises:
        TypeError: an argument is not a tensor, or of an unsupported dtype.
        ValueError: shapes, dtypes or devices don't match, a threshold is NaN, margin is negative or not
            finite, max_entries is negative, or the activation is unknown.
        RuntimeError: more than ``max_entries`` entries came out, or more than there is memory for; in a CUDA
            graph, which can't raise, all values are NaN then. Or a backend was named that can't serve this.

    Example:
        >>> import torch, fastsparse
        >>> x = torch.tensor([[3.0, 5.0, -1.0], [0.5, 0.0, 2.0]])
        >>> values, indices, offsets = fastsparse.threshold_encode(x, torch.eye(3), threshold=1.0)
        >>> values.tolist(), indices.tolist(), offsets.tolist()
        ([3.0, 5.0, 2.0], [0, 1, 2], [0, 2, 3])

    Source: the encoder of Rajamanoharan et al. 2024, "Jumping Ahead: Improving Reconstruction Fidelity with
    JumpReLU Sparse Autoencoders", arXiv 2407.14435, before its activation.
    """
    x, weight, bias = autocast(x, weight, bias)
    activations = ("none", "abs")
    M, chosen = _check_encoder(
        "threshold_encode", x, weight, bias, activation, None, latent_mask, activations
    )
    check_tolerance("threshold_encode", "margin", margin)
    if max_entries is not None:
        max_entries = check_count("threshold_encode", "max_entries", max_entries, 0)
    bounds = _bounds(threshold, margin, x, M)
    found = ops.threshold_encode(flat(x), weight, bias, bounds, chosen == 1, latent_mask, max_entries)
    return Ragged(*found)


def _bounds(threshold: Tensor | float, margin: float, x: Tensor, M: int) -> Tensor:
    """What scores are compared with, (M,) in the type that sums are carried in."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if isinstance(threshold, Tensor):
        check_vector("threshold_encode", "threshold", threshold, "M", M)
        check_device("threshold_encode", "threshold", threshold, "x", x)
        bounds = threshold.detach().to(wide)
        return bounds - margin if margin else bounds
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"threshold_encode: threshold must be a tensor or a float, got {named(threshold)}")
    return torch.full((M,), threshold - margin, dtype=wide, device=x.device)


def _check_encoder(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, latent_scale: Tensor | None,
    latent_mask: Tensor | None, activations: Sequence[str] = ACTIVATIONS,
) -> tuple[int, int]:  # fmt: skip
    """What encoders have in common; returns M, and where the activation stands."""
    M, D = check_matrix(op, "weight", weight)
    check_rows(op, "x", x, D)
    if bias is not None:
        check_vector(op, "bias", bias, "M", M)
    if latent_scale is not None:
        check_vector(op, "latent_scale", latent_scale, "M", M)
    check_alike(op, (("x", x), ("weight", weight), ("bias", bias), ("latent_scale", latent_scale)))
    if latent_mask is not None:
        check_mask(op, "latent_mask", latent_mask, M)
        check_device(op, "latent_mask", latent_mask, "x", x)
    return M, position_of(op, "activation", activation, activations)


def sparse_decode(
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Decode sparse codes: ``out[n] = sum_j values[n, j] * weight[indices[n, j]] + bias``.

    Sums are carried in fp32 (fp64 for fp64 inputs). An index may occur more than once in a row.

    Args:
        values: (..., k) coefficients; fp32, bf16, fp16 or fp64. Of a ragged code (E,).
        indices: int64 or int32, each in [0, M); the shape of ``values``.
        weight: (M, D) decoder, one atom a row; the dtype of ``values``.
        bias: (D,), the dtype of ``values``.
        offsets: of a ragged code: (N + 1,) int64, row n being entries ``offsets[n]`` up to
            ``offsets[n + 1]``: from 0 on, and to the end, but for padding of index 0.

    Returns:
        (..., D) reconstructions, (N, D) of a ragged code. Gradients reach values, weight and bias.

    Raises:
        TypeError: an argument is not a tensor, or of an unsupported dtype.
        ValueError: shapes, dtypes or devices don't match, or offsets don't bound rows.
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
    out = _spmm("sparse_decode", values, indices, weight, bias, offsets)
    return out if bias is None else out + bias


def spmm(values: Tensor, indices: Tensor, weight: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Multiply sparse codes with a dense matrix: ``out[n] = sum_j values[n, j] * weight[indices[n, j]]``.

    Args:
        values: (..., k); fp32, bf16, fp16 or fp64. Of a ragged code (E,).
        indices: int64 or int32, each in [0, M); the shape of ``values``.
        weight: (M, D), the dtype of ``values``.
        offsets: (N + 1,) int64, the rows of a ragged code, as in :func:`sparse_decode`.

    Returns:
        (..., D), (N, D) of a ragged code, differentiable in values and weight.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`sparse_decode`.

    Example:
        >>> import torch, fastsparse
        >>> fastsparse.spmm(torch.tensor([[2.0]]), torch.tensor([[1]]), torch.eye(2)).tolist()
        [[0.0, 2.0]]

    Source: the SpMM of Gao et al. 2024, arXiv 2406.04093, appendix D.2.
    """
    values, weight = autocast(values, weight)
    return _spmm("spmm", values, indices, weight, None, offsets)


def _spmm(
    op: str, values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor | None
) -> Tensor:
    if offsets is None and are_plain(indices, values, weight) and values.shape == indices.shape:
        if bias is not None:
            check_vector(op, "bias", bias, "D", weight.shape[1])
            check_alike(op, (("values", values), ("bias", bias)))
        return ops.spmm(values, indices, weight, None)
    _, D = check_matrix(op, "weight", weight)
    indices = check_code(op, values, indices)
    if bias is not None:
        check_vector(op, "bias", bias, "D", D)
    check_alike(op, (("values", values), ("weight", weight), ("bias", bias)))
    check_device(op, "indices", indices, "values", values)
    if offsets is not None:
        check_ragged(op, indices, offsets)
        return ops.spmm(values, indices, weight, offsets)
    return unflat(ops.spmm(flat(values), flat(indices), weight, None), values)


def sddmm(x: Tensor, weight: Tensor, indices: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Score given latents only: ``out[n, j] = x[n] @ weight[indices[n, j]]``.

    Args:
        x: (..., D); fp32, bf16, fp16 or fp64.
        weight: (M, D), the dtype of ``x``.
        indices: (..., k) int64 or int32, each in [0, M); the leading dimensions of ``x``. Of a ragged code
            (E,).
        offsets: (N + 1,) int64, the rows of a ragged code, as in :func:`sparse_decode`; N is the number of
            tokens in ``x``.

    Returns:
        As ``indices``, 0 for padding; differentiable in x and weight.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as :func:`sparse_decode`.

    Example:
        >>> import torch, fastsparse
        >>> fastsparse.sddmm(torch.tensor([[3.0, 5.0]]), torch.eye(2), torch.tensor([[1, 0]])).tolist()
        [[5.0, 3.0]]

    Source: the SDDMM of Gao et al. 2024, arXiv 2406.04093, appendix D.2.
    """
    x, weight = autocast(x, weight)
    plain = offsets is None and are_plain(indices, x, weight)
    if plain and x.shape[0] == indices.shape[0] and x.shape[1] == weight.shape[1]:
        return ops.sddmm(x, weight, indices, None)
    _, D = check_matrix("sddmm", "weight", weight)
    check_rows("sddmm", "x", x, D)
    indices = check_indices("sddmm", indices)
    check_alike("sddmm", (("x", x), ("weight", weight)))
    check_device("sddmm", "indices", indices, "x", x)
    if offsets is not None:
        check_ragged("sddmm", indices, offsets, x)
        return ops.sddmm(flat(x), weight, indices, offsets)
    check_leading("sddmm", "x", x, indices)
    return unflat(ops.sddmm(flat(x), weight, flat(indices), None), indices)


def spmm_t(
    values: Tensor, indices: Tensor, x: Tensor, num_latents: int, offsets: Tensor | None = None
) -> Tensor:
    """Multiply transposed sparse codes with rows: sum ``values[n, j] * x[n]`` into ``out[indices[n, j]]``.

    The order of every sum is fixed: the result is bitwise reproducible, for any number of threads.

    Args:
        values: (..., k); fp32, bf16, fp16 or fp64. Of a ragged code (E,).
        indices: int64 or int32, each in [0, M); the shape of ``values``.
        x: (..., D), the dtype and the leading dimensions of ``values``.
        num_latents: M.
        offsets: (N + 1,) int64, the rows of a ragged code, as in :func:`sparse_decode`; N is the number of
            tokens in ``x``.

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
    check_alike("spmm_t", (("values", values), ("x", x)))
    check_device("spmm_t", "indices", indices, "values", values)
    num_latents = check_count("spmm_t", "num_latents", num_latents, 0)
    if offsets is not None:
        check_ragged("spmm_t", indices, offsets, x)
        return ops.spmm_t(values, indices, flat(x), num_latents, offsets)
    check_leading("spmm_t", "x", x, indices)
    return ops.spmm_t(flat(values), flat(indices), flat(x), num_latents, None)
