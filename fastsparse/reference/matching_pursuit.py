"""Matching pursuit and its reversible gradient (Mallat & Zhang 1993; as an encoder: arXiv 2506.03093)."""

import torch
from torch import Tensor

from fastsparse.reference._precision import accumulate
from fastsparse.reference.matching_pursuit_step import squared_norms, take


def matching_pursuit(
    x: Tensor,
    dictionary: Tensor,
    k: int,
    tol: float = 0.0,
    nonnegative: bool = False,
    normalized: bool = False,
    method: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, D), dictionary (M, D); returns values (N, k), indices (N, k) and the residual (N, D).

    k steps from r = x, carried in fp32 (fp64 for fp64 inputs) and rounded at the end alone. A row that has
    come to |r| <= tol > 0, or has no atom left to take, stays as it is: its other slots hold value 0 and
    index 0. ``method`` says how kernels find the scores, of which this is the definition.
    """
    residual, atoms = accumulate(x).contiguous(), accumulate(dictionary)
    squares = None if normalized else squared_norms(atoms)
    values, indices = [], []
    for _ in range(k):
        value, index, after = take(residual, atoms, squares, nonnegative)
        if tol > 0:
            done = torch.linalg.vector_norm(residual.detach(), dim=1, dtype=torch.float64) <= tol
            value, index = value.masked_fill(done, 0), index.masked_fill(done, 0)
            after = torch.where(done.unsqueeze(1), residual, after)
        values.append(value)
        indices.append(index)
        residual = after
    return torch.stack(values, dim=1).to(x.dtype), torch.stack(indices, dim=1), residual.to(x.dtype)


def matching_pursuit_backward(
    values: Tensor,
    indices: Tensor,
    residual: Tensor,
    dictionary: Tensor,
    d_values: Tensor,
    d_residual: Tensor | None,
    normalized: bool,
    needs_x: bool,
    needs_dictionary: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of :func:`matching_pursuit` for the atoms chosen: d_x (N, D), d_dictionary (M, D).

    What isn't needed comes out empty, of shape (0,). One step, with w the atom, s = |w|^2 and r the residual
    before it, is c = (w.r) / s and r' = r - c w. Let g = dL/dr', and gc what reaches c from ``values``. Then
        dL/dc in all            p  = gc - g.w
        through c to r          g <- g + p w / s
        through c and r' to w   dw = p (r / s - 2 (w.r) w / s^2) - c g = q (r - 2 c w) - c g,  q = p / s
    where r - 2 c w = r' - c w. With ``normalized`` s is the constant 1: dw = q (r' + c w) - c g. Backwards
    from the last step r is r' + c w: no residual but the last has to be kept. A slot of value 0 was no step.
    """
    atoms = accumulate(dictionary)
    squares = None if normalized else squared_norms(atoms)  # of zero atoms too, which no step has taken
    r, values, d_values = accumulate(residual), accumulate(values), accumulate(d_values)
    g = torch.zeros_like(r) if d_residual is None else accumulate(d_residual).contiguous()
    d_atoms = atoms.new_zeros(atoms.shape) if needs_dictionary else None
    for t in reversed(range(values.shape[1])):
        index, c = indices[:, t], values[:, t : t + 1]
        w, taken = atoms[index], c != 0
        q = d_values[:, t : t + 1] - (g * w).sum(dim=1, keepdim=True)
        if squares is not None:
            q = (q / squares[index].unsqueeze(1)).to(q.dtype)
        if d_atoms is not None:
            d_w = q * (r + c * w if normalized else r - c * w) - c * g
            d_atoms.index_add_(0, index, torch.where(taken, d_w, 0.0))
        r = r + c * w
        g = torch.where(taken, g + q * w, g)
    empty = residual.new_empty(0)
    return (
        g.to(residual.dtype) if needs_x else empty,
        empty.clone() if d_atoms is None else d_atoms.to(dictionary.dtype),
    )
