"""``fastsparse::topk_encode``: TopK encoding. Gradients, through selected entries only: spmm and spmm_t."""

from torch import Tensor

from fastsparse import ops, reference
from fastsparse._options import ACTIVATIONS
from fastsparse._validation import check_eligible
from fastsparse.ops._library import register, total


def _check(x, weight, bias, k, activation, latent_scale, latent_mask) -> None:
    check_eligible(weight, k, latent_mask)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, _, activation, _, _ = inputs
    values, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, indices, values if ACTIVATIONS[activation] == "relu" else None)


def _backward(ctx, grad: Tensor | None, _):
    if grad is None:
        return (None,) * 7
    x, weight, indices, rectified = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    if rectified is not None:
        grad = grad.masked_fill(rectified <= 0, 0)  # NaN is not <= 0: it keeps its gradient, as in torch.relu
    num_latents = weight.shape[0]
    d_x = ops.spmm(grad, indices, weight) if needs_x else None
    d_weight = ops.spmm_t(grad, indices, x, num_latents) if needs_weight else None
    d_bias = None
    if needs_bias:
        d_bias = ops.spmm_t(grad, indices, grad.new_ones(grad.shape[0], 1), num_latents)[:, 0]
    return d_x, d_weight, d_bias, None, None, None, None


def _jvp(inputs, output, tangents) -> tuple[Tensor | None, None]:
    x, weight, _, _, activation, _, _ = inputs
    values, indices = output
    t_x, t_weight, t_bias, *_ = tangents
    found = total(
        None if t_x is None else ops.sddmm(t_x, weight, indices),
        None if t_weight is None else ops.sddmm(x, t_weight, indices),
        None if t_bias is None else t_bias[indices],
    )
    if found is not None and ACTIVATIONS[activation] == "relu":
        found = found.masked_fill(values <= 0, 0)
    return found, None


topk_encode = register(
    "topk_encode(Tensor x, Tensor weight, Tensor? bias, SymInt k, int activation, Tensor? latent_scale, "
    "Tensor? latent_mask) -> (Tensor values, Tensor indices)",
    "x (N, D), weight (M, D), bias (M)?, latent_scale (M)?, latent_mask (M) bool? "
    "-> values (N, k), indices (N, k) int64",
    reference=reference.topk_encode,
    setup_context=_setup_context,
    backward=_backward,
    jvp=_jvp,
    options={"activation": ACTIVATIONS},
    check=_check,
)
