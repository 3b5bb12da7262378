"""``fastsparse::matching_pursuit``, and its gradient, which goes back through the steps: an op of its own."""

import torch
from torch import Tensor

from fastsparse import reference
from fastsparse._options import METHODS
from fastsparse.ops._library import register, register_backward
from fastsparse.reference._precision import accumulate


def _setup_context(ctx, inputs, output) -> None:
    _, dictionary, _, _, _, ctx.normalized, _ = inputs
    values, indices, residual = output
    ctx.mark_non_differentiable(indices)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(values, indices, residual, dictionary)


def _backward(ctx, d_values: Tensor | None, _, d_residual: Tensor | None):
    d_x, d_dictionary = gradients(*ctx.saved_tensors, d_values, d_residual, ctx)
    return d_x, d_dictionary, None, None, None, None, None


def gradients(
    values: Tensor,
    indices: Tensor,
    residual: Tensor,
    dictionary: Tensor,
    d_values: Tensor | None,
    d_residual: Tensor | None,
    ctx,
) -> tuple[Tensor | None, Tensor | None]:
    """What reaches x and the dictionary, None where it isn't needed."""
    if d_values is None and d_residual is None:
        return None, None
    if d_values is None:
        d_values = torch.zeros_like(values)
    wanted = ctx.needs_input_grad[:2]
    found = matching_pursuit_backward(
        values, indices, residual, dictionary, d_values, d_residual, ctx.normalized, *wanted
    )
    return tuple(grad if needed else None for grad, needed in zip(found, wanted, strict=True))


def _jvp(inputs, output, tangents) -> tuple[Tensor, None, Tensor]:
    x, dictionary, *_, normalized, _ = inputs
    values, indices, _ = output
    t_values, t_residual = tangents_of_steps(x, dictionary, values, indices, normalized, *tangents[:2])
    return t_values, None, t_residual


def tangents_of_steps(
    x: Tensor,
    dictionary: Tensor,
    values: Tensor,
    indices: Tensor,
    normalized: bool,
    t_x: Tensor | None,
    t_dictionary: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Tangents of values and residual, for the atoms chosen.

    One step, with w the atom and s = |w|^2, is c = (w.r) / s and r' = r - c w. So tc = (w.tr + tw.r -
    2 c w.tw) / s, or, with ``normalized``, s being the constant 1, w.tr + tw.r; tr' = tr - tc w - c tw. A
    slot of value 0 was no step.
    """
    r = accumulate(x)
    t_r = torch.zeros_like(r) if t_x is None else accumulate(t_x)
    t_values = []
    for index, c in zip(indices.unbind(1), accumulate(values).unsqueeze(-1).unbind(1), strict=True):
        w, taken = accumulate(dictionary[index]), c != 0
        t_w = torch.zeros_like(w) if t_dictionary is None else accumulate(t_dictionary[index])
        t_c = (w * t_r + t_w * r).sum(dim=1, keepdim=True)
        if not normalized:
            square = w.double().square().sum(dim=1, keepdim=True)  # where the squares of all fp32 numbers fit
            t_c = t_c - 2 * c * (w * t_w).sum(dim=1, keepdim=True)
            t_c = (t_c / torch.where(taken, square, 1)).to(c.dtype)
        t_c = torch.where(taken, t_c, 0)
        t_r = torch.where(taken, t_r - t_c * w - c * t_w, t_r)
        r = torch.where(taken, r - c * w, r)
        t_values.append(t_c)
    return torch.cat(t_values, dim=1).to(values.dtype), t_r.to(x.dtype)


matching_pursuit = register(
    "matching_pursuit(Tensor x, Tensor dictionary, SymInt k, float tol, bool nonnegative, bool normalized, "
    "int method) -> (Tensor values, Tensor indices, Tensor residual)",
    "x (N, D), dictionary (M, D) -> values (N, k), indices (N, k) int64, residual (N, D)",
    reference=lambda *arguments: reference.matching_pursuit(*arguments[:-1]),  # one for all methods
    setup_context=_setup_context,
    backward=_backward,
    jvp=_jvp,
    options={"method": METHODS},
)


# Of values, indices, residual (as matching_pursuit returned them) and dictionary; d_values (N, k) and
# d_residual (N, D) in any strides. An output that isn't needed is empty, of shape (0,).
matching_pursuit_backward = register_backward(
    "matching_pursuit_backward(Tensor values, Tensor indices, Tensor residual, Tensor dictionary, "
    "Tensor d_values, Tensor? d_residual, bool normalized, bool needs_x, bool needs_dictionary) "
    "-> (Tensor d_x, Tensor d_dictionary)",
    "values (N, k), indices (N, k) int64 < M, residual (N, D), dictionary (M, D), d_values (N, k), "
    "d_residual (N, D)? -> d_x (N, D) if needs_x, d_dictionary (M, D) if needs_dictionary",
    reference=reference.matching_pursuit_backward,
)
