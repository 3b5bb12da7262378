"""One step of matching pursuit: choose the atom that explains most of the residual, and take it away."""

import torch
from torch import Tensor

from fastsparse.reference._precision import accumulate


def matching_pursuit_step(
    residual: Tensor, dictionary: Tensor, nonnegative: bool = False, normalized: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """residual (N, D), dictionary (M, D); returns value (N,), index (N,), the residual after it (N, D)."""
    atoms = accumulate(dictionary)
    squares = None if normalized else squared_norms(atoms)
    value, index, after = take(accumulate(residual).contiguous(), atoms, squares, nonnegative)
    return value.to(residual.dtype), index, after.to(residual.dtype)


def squared_norms(dictionary: Tensor) -> Tensor:
    """(M,) in fp64, where the squares of all fp32 numbers fit."""
    return dictionary.double().square().sum(dim=1)


def take(
    residual: Tensor, dictionary: Tensor, squares: Tensor | None, nonnegative: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """A step in the precision of its inputs; ``squares`` (M,) are the atoms' |w|^2, None if all are 1.

    Selection, which has no gradient, is on |w.r| / |w|, or w.r / |w| if nonnegative; NaN counts as largest,
    ties go to the lowest index, zero atoms score 0. The coefficient is (w.r) / |w|^2. Where it is 0, or not
    positive and has to be, the step is none: value 0, index 0, the residual as it was.
    """
    scores = residual.detach() @ dictionary.detach().T  # (N, M)
    if squares is not None:
        zero = squares == 0
        squares = torch.where(zero, 1, squares)
        scores = torch.where(zero, 0.0, scores / squares.detach().sqrt().to(scores.dtype))
    index = (scores if nonnegative else scores.abs()).argmax(dim=1)  # torch's argmax takes NaN as largest
    atom = dictionary[index]  # (N, D)
    value = (residual * atom).sum(dim=1)
    if squares is not None:
        value = (value / squares[index]).to(value.dtype)
    none = value <= 0 if nonnegative else value == 0
    if squares is not None:
        none = none | zero[index]
    value, index = value.masked_fill(none, 0), index.masked_fill(none, 0)
    after = torch.where(none.unsqueeze(1), residual, residual - value.unsqueeze(1) * atom)
    return value, index, after
