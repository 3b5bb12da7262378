"""``fastsparse::matching_pursuit``, and its gradient, which goes back through the steps: an op of its own."""

import torch
from torch import Tensor

from fastsparse import reference
from fastsparse._options import METHODS, option_at
from fastsparse.ops._library import register, register_backward


def _reference(x, *options):
    *options, method = options
    option_at("matching_pursuit", "method", method, METHODS)  # one definition for all of them
    with torch.autocast(x.device.type, enabled=False):  # which would take the products down to halves
        return reference.matching_pursuit(x, *options)


def _fake(x, dictionary, k, tol, nonnegative, normalized, method):
    shape = (x.shape[0], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64), x.new_empty(x.shape)


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
    found = torch.ops.fastsparse.matching_pursuit_backward.default(
        values, indices, residual, dictionary, d_values, d_residual, ctx.normalized, *wanted
    )
    return tuple(grad if needed else None for grad, needed in zip(found, wanted, strict=True))


matching_pursuit = register(
    "matching_pursuit(Tensor x, Tensor dictionary, SymInt k, float tol, bool nonnegative, bool normalized, "
    "int method) -> (Tensor values, Tensor indices, Tensor residual)",
    form="x (N, D), dictionary (M, D)",
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _reference_backward(values, *arguments):
    with torch.autocast(values.device.type, enabled=False):
        return reference.matching_pursuit_backward(values, *arguments)


def _fake_backward(
    values, indices, residual, dictionary, d_values, d_residual, normalized, needs_x, needs_dictionary
):
    return (
        residual.new_empty(residual.shape if needs_x else (0,)),
        dictionary.new_empty(dictionary.shape if needs_dictionary else (0,)),
    )


# Of values, indices, residual (as matching_pursuit returned them) and dictionary; d_values (N, k) and
# d_residual (N, D) in any strides. An output that isn't needed is empty, of shape (0,).
register_backward(
    "matching_pursuit_backward(Tensor values, Tensor indices, Tensor residual, Tensor dictionary, "
    "Tensor d_values, Tensor? d_residual, bool normalized, bool needs_x, bool needs_dictionary) "
    "-> (Tensor d_x, Tensor d_dictionary)",
    form="values (N, k), indices (N, k) int64, residual (N, D), dictionary (M, D), d_values (N, "
    "k), d_residual (N, D)?",
    reference=_reference_backward,
    fake=_fake_backward,
)
