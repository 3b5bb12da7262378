"""Whether activations add up from factors: how well directions of concepts fit, how orthogonal they are."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastsparse._validation import check_flag, check_matrix, check_tensor

_VARIANCE = 0.95  # the share that k95 is about
_RANK = 1e-10  # of the largest eigenvalue: directions with less variance than that are taken for none


class Compositionality(NamedTuple):
    """What :func:`compositionality` returns.

    Attributes:
        r2: the share of the variance that the additive fit explains, at most 1.
        directions: of each concept (V, D) float64: what each of its values adds, 0 on average over tokens.
        within: the mean absolute cosine of two directions of one concept; 0 where there are none.
        across: of two directions of different concepts.
        k95: (C,) int64, how many principal components hold 95 % of the variance of each concept's directions.
    """

    r2: float
    directions: tuple[Tensor, ...]
    within: float
    across: float
    k95: Tensor


def compositionality(x: Tensor, factors: Tensor, *, whiten: bool = False) -> Compositionality:
    """Fit activations by a sum of directions, one for the value that each concept has.

    ``x = mean + u_1[factors[:, 0]] + ... + u_C[factors[:, C - 1]]``, by least squares over all values at
    once: exact for additive data whatever the counts, as means over the tokens of each value are not.

    Args:
        x: (N, D) floating.
        factors: (N, C) int64, the value that each token has of each concept, from 0 on.
        whiten: whether x is whitened first, so that every direction in which it varies counts alike.

    Returns:
        :class:`Compositionality`.

    Raises:
        TypeError, ValueError: a shape or dtype is wrong, a value is negative or has no token, x is not finite
            or doesn't vary.

    Example:
        >>> import torch
        >>> from fastsparse.metrics import compositionality
        >>> factors = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [1, 1]])
        >>> x = torch.eye(4)[factors[:, 0]] + torch.eye(4)[2 + factors[:, 1]]
        >>> found = compositionality(x, factors)
        >>> round(found.r2, 6), round(found.across, 6), found.k95.tolist()
        (1.0, 0.0, [1, 1])

    Source: arXiv 2602.24264 (the additive fit and orthogonality of factors).
    """
    op = "compositionality"
    N, _ = check_matrix(op, "x", x)
    check_flag(op, "whiten", whiten)
    check_tensor(op, "factors", factors)
    if factors.dtype != torch.int64 or factors.dim() != 2 or len(factors) != N or factors.shape[1] == 0:
        raise ValueError(
            f"{op}: factors must be int64 of shape (N, C) with N = {N} and C >= 1, got "
            f"{str(factors.dtype)[6:]} of shape {tuple(factors.shape)}"
        )
    if N == 0:
        raise ValueError(f"{op}: x must hold at least one token, got none")
    if not x.isfinite().all():
        raise ValueError(f"{op}: x must be finite, got NaN or infinity")
    sizes = [int(most) + 1 for most in factors.amax(dim=0)]
    counts = [
        torch.bincount(column.clamp_min(0), minlength=V) for column, V in zip(factors.T, sizes, strict=True)
    ]
    for c, present in enumerate(counts):
        if factors[:, c].amin() < 0 or not present.all():
            raise ValueError(
                f"{op}: factors[:, {c}] must have every value from 0 to {sizes[c] - 1}, and no others"
            )
    tokens = x.detach().double()
    tokens = tokens - tokens.mean(dim=0)
    spread = tokens.square().sum().item()
    if not spread > _RANK**2 * x.detach().double().square().sum().item():
        raise ValueError(f"{op}: x must vary from token to token")
    if whiten:
        tokens = _whitened(tokens)
        spread = tokens.square().sum().item()
    begins = torch.tensor([0, *sizes[:-1]], device=x.device).cumsum(0)
    columns = factors + begins  # (N, C): the ones in the rows of a matrix (N, V_1 + ... + V_C)
    total = sum(sizes)
    # Its normal equations, of counts of pairs of values and of sums of tokens: that matrix is never made.
    pairs = columns.unsqueeze(2) * total + columns.unsqueeze(1)
    normal = torch.bincount(pairs.flatten(), minlength=total**2).view(total, total).double()
    sums = tokens.new_zeros(total, tokens.shape[1])
    for column in columns.T:
        sums.index_add_(0, column, tokens)
    # The concepts' values all add up to 1, so it is singular; which of the solutions makes no difference to
    # the fit, nor to directions that are 0 on average.
    solved = torch.linalg.pinv(normal, hermitian=True) @ sums
    left = tokens - sum(solved[column] for column in columns.T)
    directions = tuple(
        part - (part * (present / N).unsqueeze(1)).sum(dim=0)
        for part, present in zip(solved.split(sizes), counts, strict=True)
    )
    within, across = _cosines(directions)
    k95 = torch.tensor([_components(part) for part in directions], device=x.device)
    return Compositionality(1 - left.square().sum().item() / spread, directions, within, across, k95)


def _whitened(tokens: Tensor) -> Tensor:
    """Centred tokens in coordinates in which their covariance is 1, or 0 where they don't vary."""
    variances, axes = torch.linalg.eigh(tokens.T @ tokens / len(tokens))
    varying = variances > _RANK * variances[-1]
    return tokens @ (axes[:, varying] / variances[varying].sqrt())


def _cosines(directions: tuple[Tensor, ...]) -> tuple[float, float]:
    """Mean absolute cosines of two directions, of one concept and of two; those of length 0 have none."""
    concept = torch.cat([part.new_full((len(part),), c) for c, part in enumerate(directions)])
    rows = torch.cat(directions)
    norms = torch.linalg.vector_norm(rows, dim=1)
    there = norms > _RANK * norms.amax()
    rows, concept = rows[there] / norms[there].unsqueeze(1), concept[there]
    cosines = (rows @ rows.T).abs()
    same = concept.unsqueeze(1) == concept
    of_two = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    within, across = cosines[same & of_two], cosines[~same]
    return tuple(part.mean().item() if len(part) else 0.0 for part in (within, across))


def _components(part: Tensor) -> int:
    """How many principal components hold most of the variance of a concept's directions."""
    variances = torch.linalg.svdvals(part).square()
    shares = variances.cumsum(0) / variances.sum()
    return int((shares < _VARIANCE).sum()) + 1 if variances.sum() > 0 else 0
