"""``fastsparse::topk_encode``: TopK encoding. Gradients, through selected entries only: spmm and spmm_t."""

from torch import Tensor

from fastsparse import reference
from fastsparse._options import ACTIVATIONS
from fastsparse._validation import check_eligible, check_groups
from fastsparse.ops._encoders import gradients, tangent
from fastsparse.ops._library import register


def _check(x, weight, bias, k, activation, latent_scale, latent_mask, groups) -> None:
    check_groups("topk_encode", weight, groups)
    check_eligible("topk_encode", "k", k, latent_mask, groups=groups)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, _, activation, *_ = inputs
    values, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, indices, values if ACTIVATIONS[activation] == "relu" else None)


def _backward(ctx, grad: Tensor | None, _):
    if grad is None:
        return (None,) * 8
    x, weight, indices, rectified = ctx.saved_tensors
    if rectified is not None:
        grad = grad.masked_fill(rectified <= 0, 0)  # NaN is not <= 0: it keeps its gradient, as in torch.relu
    return *gradients(grad, x, weight, indices, None, ctx.needs_input_grad[:3]), *(None,) * 5


def _jvp(inputs, output, tangents) -> tuple[Tensor | None, None]:
    x, weight, _, _, activation, *_ = inputs
    values, indices = output
    found = tangent(tangents[:3], x, weight, indices, None)
    if found is not None and ACTIVATIONS[activation] == "relu":
        found = found.masked_fill(values <= 0, 0)
    return found, None


topk_encode = register(
    "topk_encode(Tensor x, Tensor weight, Tensor? bias, SymInt k, int activation, Tensor? latent_scale, "
    "Tensor? latent_mask, SymInt groups) -> (Tensor values, Tensor indices)",
    "x (N, D), weight (M, D), bias (M)?, latent_scale (M)?, latent_mask (M) bool? "
    "-> values (N, groups k), indices (N, groups k) int64",
    reference=reference.topk_encode,
    setup_context=_setup_context,
    backward=_backward,
    jvp=_jvp,
    options={"activation": ACTIVATIONS},
    check=_check,
)
