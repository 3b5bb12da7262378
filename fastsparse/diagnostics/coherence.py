"""How alike atoms are, and what that promises of the codes that they can make."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastsparse._validation import check_count, check_matrix, check_tensor, check_vector
from fastsparse.diagnostics.metric import directions
from fastsparse.functional import topk_encode

_SAMPLED = 1 << 22  # numbers drawn, and entries of Gram matrices, at a time


class Coherence(NamedTuple):
    """What :func:`coherence` returns.

    Attributes:
        per_atom: (M,) the largest absolute cosine of each atom with another one; 1 for an atom of zeros.
        nearest: (M,) int64, which one; -1 for an atom of zeros, and where there is no other.
        mutual: scalar, the largest of all: the coherence of the dictionary.
        num_zero: how many atoms are zeros.
    """

    per_atom: Tensor
    nearest: Tensor
    mutual: Tensor
    num_zero: int


class RestrictedIsometry(NamedTuple):
    """Bounds on the restricted isometry constant of some order: of how far K atoms are from orthonormal.

    Attributes:
        sampled: the largest found among the sampled supports: no more than the constant.
        bound: (K - 1) times the coherence: no less than it.
    """

    sampled: float
    bound: float


def coherence(atoms: Tensor, metric: Tensor | None = None) -> Coherence:
    """Find the atom most like each atom: the largest absolute cosine between two.

    It is a top-2 search of all atoms among all, M^2 D multiplications, and takes O(M) memory beside copies of
    the atoms: the M x M matrix is never made.

    Args:
        atoms: (M, D) floating, of any norms, at least one.
        metric: (D, D), such as :func:`atomic_metric` returns; default: the usual inner product.

    Returns:
        :class:`Coherence`, of float32, or float64 for such atoms.

    Raises:
        TypeError, ValueError: a shape or dtype is wrong, there is no atom, or one is not finite.

    Example:
        >>> import torch
        >>> from fastsparse.diagnostics import coherence
        >>> found = coherence(torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.6, -0.8]]))
        >>> [round(mu, 4) for mu in found.per_atom.tolist()], found.nearest.tolist()
        ([0.6, 0.8, 0.8], [2, 2, 1])

    Source: Elad 2010, "Sparse and Redundant Representations", definition 2.3; arXiv 2509.20784.
    """
    rows, zero = _unit_rows("coherence", atoms, metric)
    M = len(rows)
    if M == 1:
        per_atom, nearest = rows.new_zeros(1), torch.full((1,), -1, device=rows.device)
    else:
        values, indices = topk_encode(rows, rows, k=2, activation="abs")
        # An atom itself is among its two best but where two others are as good: then each of them serves.
        other = (indices[:, 0] == torch.arange(M, device=rows.device)).long().unsqueeze(1)
        per_atom = values.gather(1, other).squeeze(1).abs().clamp_max(1)
        nearest = indices.gather(1, other).squeeze(1)
    per_atom, nearest = per_atom.masked_fill(zero, 1), nearest.masked_fill(zero, -1)
    return Coherence(per_atom, nearest, per_atom.amax(), int(zero.sum()))


def largest_unique_support(mu: float | Tensor) -> int | Tensor:
    """Say up to how many atoms a code is the only one so sparse of what it describes.

    A vector that K atoms make, K < (1 + 1 / mu) / 2, is made by no other K or fewer, and matching pursuit and
    basis pursuit find them.

    Args:
        mu: coherence, in [0, 1]: a number, or a tensor of them.

    Returns:
        K, int64 in a tensor's shape; 2^63 - 1 where mu is 0.

    Raises:
        ValueError: mu is outside [0, 1].

    Example:
        >>> from fastsparse.diagnostics import largest_unique_support
        >>> largest_unique_support(1 / 8)
        4

    Source: Donoho and Elad 2003, PNAS 100 (5), theorem 7; Tropp 2004, "Greed is good".
    """
    found = torch.as_tensor(mu, dtype=torch.float64)
    if not ((found >= 0) & (found <= 1)).all():
        raise ValueError(f"largest_unique_support: mu must be in [0, 1], got {mu}")
    most = torch.iinfo(torch.int64).max
    # 2^53 is beyond any number of atoms, and the last that a double counts one by one.
    supports = torch.ceil((1 + 1 / found) / 2) - 1
    supports = torch.where(supports < 2.0**53, supports, 0).long().masked_fill(supports >= 2.0**53, most)
    return supports if isinstance(mu, Tensor) else int(supports)


def uniqueness_fraction(per_atom: Tensor, row_counts: Tensor) -> float:
    """Say up to which quantile of atoms and of tokens codes are unique.

    The largest q for which ``mu_q < 1 / (2 K_q - 1)``: mu_q and K_q are what q of the atoms' coherences and q
    of the tokens' numbers of latents don't exceed. 1: the codes of all tokens are the sparsest of what they
    describe, whichever atoms they are of.

    Args:
        per_atom: (M,) floating, what :func:`coherence` found of each atom.
        row_counts: (N,) integers, how many latents describe each token, such as ``Ragged.row_counts()``.

    Returns:
        q, in [0, 1].

    Raises:
        TypeError, ValueError: there is no atom or no token, or a value is out of its range.

    Example:
        >>> import torch
        >>> from fastsparse.diagnostics import uniqueness_fraction
        >>> uniqueness_fraction(torch.tensor([0.1, 0.2, 0.3, 0.9]), torch.tensor([2, 2, 2, 2]))
        0.75

    Source: arXiv 2509.20784.
    """
    check_vector("uniqueness_fraction", "per_atom", per_atom, "M", per_atom.numel())
    check_tensor("uniqueness_fraction", "row_counts", row_counts)
    if row_counts.dim() != 1 or row_counts.is_floating_point() or row_counts.dtype == torch.bool:
        raise TypeError(
            f"uniqueness_fraction: row_counts must be (N,) integers, got shape {tuple(row_counts.shape)} of "
            f"{str(row_counts.dtype)[6:]}"
        )
    M, N = per_atom.numel(), row_counts.numel()
    if M == 0 or N == 0:
        raise ValueError(f"uniqueness_fraction: there must be an atom and a token, got M={M} and N={N}")
    mu, counts = per_atom.detach().double().cpu().sort().values, row_counts.cpu().long().sort().values
    if not (mu[0] >= 0 and mu[-1] <= 1):
        raise ValueError("uniqueness_fraction: per_atom must be in [0, 1]")
    if counts[0] < 0:
        raise ValueError(f"uniqueness_fraction: row_counts must be at least 0, got {int(counts[0])}")
    # Quantiles change at i / M and at j / N only: in 1 / (M N), and there the last place included.
    steps = torch.cat([torch.arange(1, M + 1) * N, torch.arange(1, N + 1) * M])
    mu_q, K_q = mu[-(-steps // N) - 1], counts[-(-steps // M) - 1]
    unique = mu_q * (2 * K_q - 1) < 1
    return int(steps.masked_fill(~unique, 0).amax()) / (M * N)


def restricted_isometry(
    atoms: Tensor,
    K: int,
    *,
    samples: int = 1000,
    metric: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> RestrictedIsometry:
    """Bound how far any K atoms, scaled to norm 1, are from orthonormal.

    The constant of order K is the least delta with ``(1 - delta) |c|^2 <= |c D|^2 <= (1 + delta) |c|^2`` for
    all codes c of K latents. To find it is NP-hard; this looks at random sets of K atoms, and at the
    coherence.

    Args:
        atoms: (M, D) floating, none of norm 0.
        K: how many atoms, at most M.
        samples: how many sets to look at.
        metric: (D, D), such as :func:`atomic_metric` returns; default: the usual inner product.
        generator: source of the sets, on the device of the atoms; default: PyTorch's global one.

    Returns:
        :class:`RestrictedIsometry`.

    Raises:
        TypeError, ValueError: a shape or dtype is wrong, an atom is zeros, or K or samples is out of range.

    Example:
        >>> import torch
        >>> from fastsparse.diagnostics import restricted_isometry
        >>> restricted_isometry(torch.eye(4), 2, samples=10)
        RestrictedIsometry(sampled=0.0, bound=0.0)

    Source: Candes and Tao 2005, "Decoding by linear programming"; Elad 2010, section 5.2.3.
    """
    op = "restricted_isometry"
    K, samples = check_count(op, "K", K, 1), check_count(op, "samples", samples, 1)
    rows, zero = _unit_rows(op, atoms, metric)
    if zero.any():
        raise ValueError(f"{op}: atoms must have none of norm 0, got {int(zero.sum())}")
    M = len(rows)
    if K > M:
        raise ValueError(f"{op}: K must be at most the number of atoms ({M}), got K={K}")
    sampled, at_once = 0.0, max(1, _SAMPLED // max(M, K * rows.shape[1]))
    for begin in range(0, samples, at_once):
        count = min(at_once, samples - begin)
        order = torch.rand(count, M, device=rows.device, generator=generator)
        chosen = rows[order.topk(K, dim=1).indices].double()
        off = torch.linalg.eigvalsh(chosen @ chosen.mT) - 1
        sampled = max(sampled, off.abs().amax().item())
    bound = (K - 1) * coherence(rows).mutual.item()
    return RestrictedIsometry(sampled, bound)


def _unit_rows(op: str, atoms: Tensor, metric: Tensor | None) -> tuple[Tensor, Tensor]:
    """Atoms at norm 1, and which of them have none."""
    M, _ = check_matrix(op, "atoms", atoms)
    if M == 0:
        raise ValueError(f"{op}: atoms must hold at least one, got shape {tuple(atoms.shape)}")
    if not atoms.isfinite().all():
        raise ValueError(f"{op}: atoms must be finite, got NaN or infinity")
    rows = directions(op, atoms, metric)
    return rows, (rows == 0).all(dim=1)
