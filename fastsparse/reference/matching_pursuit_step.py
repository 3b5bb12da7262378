"""One step of matching pursuit: choose the atom that explains most of the residual, and take it away."""

import torch
from torch import Tensor

from fastsparse.reference._precision import accumulate


def matching_pursuit_step(
    residual: Tensor, dictionary: Tensor, nonnegative: bool = False, normalized: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """residual (N, D), dictionary (M, D); returns value (N,), index (N,), the residual after it (N, D)."""
    atoms = accumulate(dictionary)
    norms = None if normalized else atom_norms(atoms)
    value, index, after = take(accumulate(residual).contiguous(), atoms, norms, nonnegative)
    return value.to(residual.dtype), index, after.to(residual.dtype)


def atom_norms(dictionary: Tensor) -> Tensor:
    """(M,): the squares of all fp32 numbers fit in fp64, so that no finite norm is lost on the way."""
    return torch.linalg.vector_norm(dictionary, dim=1, dtype=torch.float64).to(dictionary.dtype)


def take(
    residual: Tensor, dictionary: Tensor, norms: Tensor | None, nonnegative: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """A step in the precision of its inputs; ``norms`` (M,) are those of the atoms, None if all are 1.

    Selection, which has no gradient, is on |w.r| / |w|, or w.r / |w| if nonnegative; NaN counts as largest,
    ties go to the lowest index, zero atoms score 0. The coefficient is (w.r) / |w|^2. Where it is 0, or not
    positive and has to be, the step is none: value 0, index 0, the residual as it was.
    """
    scores = residual.detach() @ dictionary.detach().T  # (N, M)
    if norms is not None:
        zero = norms == 0
        norms = torch.where(zero, 1, norms)
        scores = torch.where(zero, 0.0, scores / norms.detach())
    index = (scores if nonnegative else scores.abs()).argmax(dim=1)  # torch's argmax takes NaN as largest
    atom = dictionary[index]  # (N, D)
    value = (residual * atom).sum(dim=1)
    if norms is not None:
        value = value / norms[index] / norms[index]
    none = value <= 0 if nonnegative else value == 0
    if norms is not None:
        none = none | zero[index]
    value, index = value.masked_fill(none, 0), index.masked_fill(none, 0)
    after = torch.where(none.unsqueeze(1), residual, residual - value.unsqueeze(1) * atom)
    return value, index, after
