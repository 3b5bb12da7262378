"""Matching pursuit: greedy sparse codes over a dictionary, and what their residual is."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsparse import ops
from fastsparse._options import METHODS, position_of
from fastsparse._validation import (
    check_alike,
    check_count,
    check_flag,
    check_gram,
    check_matrix,
    check_rows,
    check_tolerance,
    check_unit_norm,
)
from fastsparse.functional._tensors import autocast, flat, unflat

__all__ = ["Pursuit", "matching_pursuit", "matching_pursuit_step"]


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
            what is faster, and makes no Gram matrix larger than ``FASTSPARSE_GRAM_BYTES`` (default: 1 GiB,
            16384 atoms in fp32). The last one within that is kept on the CPU, with a copy of its dictionary:
            one that doesn't change, as in inference, pays for it once. The answer is the same.
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
        NotImplementedError: by second derivatives, which the reference has and the kernels have not.

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
    k = check_count("matching_pursuit", "k", k, 1)
    check_tolerance("matching_pursuit", "tol", tol)
    check_flag("matching_pursuit", "coalesce", coalesce)
    chosen = position_of("matching_pursuit", "method", method, METHODS)
    if method == "gram":
        check_gram("matching_pursuit", dictionary)
    values, indices, residual = ops.matching_pursuit(
        flat(x), dictionary, k, tol, nonnegative, normalized, chosen
    )
    if coalesce:
        values, indices = _coalesced(values, indices)
    return Pursuit(unflat(values, x), unflat(indices, x), unflat(residual, x))


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
        TypeError, ValueError, RuntimeError, NotImplementedError: as :func:`matching_pursuit`.

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
    value, index, after = ops.matching_pursuit_step(flat(residual), dictionary, nonnegative, normalized)
    if residual.dim() == 2:
        return value, index, after
    leading = residual.shape[:-1]
    return value.reshape(leading), index.reshape(leading), unflat(after, residual)


def _check_pursuit(
    op: str, name: str, rows: Tensor, dictionary: Tensor, nonnegative: bool, normalized: bool
) -> tuple[Tensor, Tensor]:
    """The tensors as autocast wants them."""
    rows, dictionary = autocast(rows, dictionary)
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
