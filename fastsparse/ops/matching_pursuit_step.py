"""``fastsparse::matching_pursuit_step``: one step alone. Its gradient is matching_pursuit's for k = 1."""

from torch import Tensor

from fastsparse import reference
from fastsparse.ops._library import register
from fastsparse.ops.matching_pursuit import gradients, tangents_of_steps


def _setup_context(ctx, inputs, output) -> None:
    _, dictionary, _, ctx.normalized = inputs
    value, index, residual = output
    ctx.mark_non_differentiable(index)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(value, index, residual, dictionary)


def _backward(ctx, d_value: Tensor | None, _, d_residual: Tensor | None):
    value, index, residual, dictionary = ctx.saved_tensors
    d_values = None if d_value is None else d_value.unsqueeze(1)
    code = value.unsqueeze(1), index.unsqueeze(1), residual
    d_x, d_dictionary = gradients(*code, dictionary, d_values, d_residual, ctx)
    return d_x, d_dictionary, None, None


def _jvp(inputs, output, tangents) -> tuple[Tensor, None, Tensor]:
    residual, dictionary, _, normalized = inputs
    value, index, _ = output
    code = value.unsqueeze(1), index.unsqueeze(1)
    t_values, t_residual = tangents_of_steps(residual, dictionary, *code, normalized, *tangents[:2])
    return t_values[:, 0], None, t_residual


matching_pursuit_step = register(
    "matching_pursuit_step(Tensor residual, Tensor dictionary, bool nonnegative, bool normalized) "
    "-> (Tensor value, Tensor index, Tensor residual)",
    "residual (N, D), dictionary (M, D) -> value (N), index (N) int64, residual (N, D)",
    reference=reference.matching_pursuit_step,
    setup_context=_setup_context,
    backward=_backward,
    jvp=_jvp,
)
