"""The inner product that activations themselves suggest: atoms compared by what they do to the data."""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from fastsparse._validation import check_matrix, check_rows


def atomic_metric(x: Tensor | Iterable[Tensor]) -> Tensor:
    """Invert the second moment of activations: the metric S of the atomic inner product ``<u, v> = u' S v``.

    ``S = E[x x']^-1``, about zero, not about the mean. Angles under S are those of vectors whitened by the
    data, and so the same whichever linear map the data have been through. Where the moment is singular, as it
    is of fewer than D tokens, its pseudo-inverse takes its place, with a warning: directions in which there
    are no data then count as nothing.

    Args:
        x: (N, D) floating, at least one token; or batches of such, which are added up one by one.

    Returns:
        (D, D) float64, symmetric, on the device of ``x``.

    Raises:
        TypeError, ValueError: x holds no token, something not finite, or batches of different widths.

    Example:
        >>> import torch
        >>> from fastsparse.diagnostics import atomic_metric
        >>> metric = atomic_metric(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        >>> [round(entry, 6) for entry in metric.diagonal().tolist()]
        [2.0, 0.5]

    Source: arXiv 2509.20784.
    """
    moment, num_tokens = None, 0
    for batch in (x,) if isinstance(x, Tensor) else x:
        _, D = check_matrix("atomic_metric", "x", batch)
        if moment is None:
            moment = torch.zeros(D, D, dtype=torch.float64, device=batch.device)
        check_rows("atomic_metric", "x", batch, len(moment))
        tokens = batch.detach().double()
        moment.addmm_(tokens.T, tokens)
        num_tokens += len(batch)
    if moment is None or num_tokens == 0:
        raise ValueError("atomic_metric: x must hold at least one token, got none")
    if not moment.isfinite().all():
        raise ValueError("atomic_metric: x must be finite, got NaN or infinity in its second moment")
    moment /= num_tokens
    factor, failed = torch.linalg.cholesky_ex(moment)
    diagonal = factor.diagonal()
    rounding = len(moment) * torch.finfo(torch.float64).eps
    if failed or diagonal.amin().square() <= rounding * diagonal.amax().square():
        rank = int(torch.linalg.matrix_rank(moment, hermitian=True))
        warnings.warn(
            f"atomic_metric: the second moment of x must have full rank ({len(moment)}) to be inverted, it "
            f"has {rank}: its pseudo-inverse is used",
            stacklevel=2,
        )
        return torch.linalg.pinv(moment, hermitian=True)
    return torch.cholesky_inverse(factor)


def atomic_cosine(u: Tensor, v: Tensor, metric: Tensor | None = None) -> Tensor:
    """Take the cosine of the angle between vectors under a metric; 0 where one of them has no length.

    Args:
        u, v: (..., D) floating, of shapes that broadcast.
        metric: (D, D), such as :func:`atomic_metric` returns; default: the usual inner product.

    Returns:
        (...) float32, or float64 where a vector is.

    Raises:
        TypeError, ValueError: the shapes don't fit, or the metric is not symmetric and positive.

    Example:
        >>> import torch
        >>> from fastsparse.diagnostics import atomic_cosine
        >>> u, v = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
        >>> round(atomic_cosine(u, v, torch.diag(torch.tensor([3.0, 1.0]))).item(), 4)
        0.866

    Source: arXiv 2509.20784.
    """
    check_rows("atomic_cosine", "v", v, check_rows_of("atomic_cosine", "u", u))
    a, b = (directions("atomic_cosine", vectors, metric) for vectors in (u, v))
    return (a * b).sum(dim=-1).clamp(-1, 1)


def check_rows_of(op: str, name: str, vectors: Tensor) -> int:
    """Floating rows (..., D); returns D."""
    check_rows(op, name, vectors, vectors.shape[-1] if isinstance(vectors, Tensor) and vectors.dim() else 0)
    return vectors.shape[-1]


def directions(op: str, vectors: Tensor, metric: Tensor | None) -> Tensor:
    """Vectors (..., D) where the metric is the usual product, at length 1, or 0 where they have none."""
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    wide = vectors.detach().double()
    least = wide.new_zeros(())
    if metric is not None:
        root = _root(op, metric, vectors.shape[-1]).to(wide.device)
        # Below it is what rounding leaves of a vector that a singular metric takes for nothing.
        least = 1e-12 * torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * torch.linalg.matrix_norm(root)
        wide = wide @ root
    norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide / norms).masked_fill(norms <= least, 0).to(dtype)


def _root(op: str, metric: Tensor, D: int) -> Tensor:
    """R of S = R R': by Cholesky or, of a singular S, by its eigenvectors."""
    if check_matrix(op, "metric", metric) != (D, D):
        raise ValueError(f"{op}: metric must have shape (D, D) = ({D}, {D}), got shape {tuple(metric.shape)}")
    metric = metric.detach().double()
    if not torch.allclose(metric, metric.T, rtol=1e-5, atol=0.0):
        raise ValueError(f"{op}: metric must be symmetric")
    factor, failed = torch.linalg.cholesky_ex(metric)
    if not failed:
        return factor
    values, vectors = torch.linalg.eigh(metric)
    if values[0] < -1e-6 * values[-1].abs():
        raise ValueError(f"{op}: metric must have no negative eigenvalue, got {values[0].item():g}")
    return vectors * values.clamp_min(0).sqrt()
