"""``fastsparse::batch_topk_encode``: BatchTopK encoding. Gradients, by its entries: spmm, spmm_t."""

from torch import Tensor

from fastsparse import reference
from fastsparse._options import ACTIVATIONS
from fastsparse._validation import check_eligible, told_bound
from fastsparse.ops._encoders import gradients, tangent
from fastsparse.ops._library import register


def _check(x, weight, bias, total, activation, latent_scale, latent_mask) -> None:
    N, M = x.shape[0], weight.shape[0]
    if not 1 <= total <= N * M:
        raise ValueError(
            f"batch_topk_encode: total must be between 1 and {told_bound(N, M)}, got total={total}"
        )
    check_eligible("batch_topk_encode", "total", total, latent_mask, rows=N)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, _, activation, *_ = inputs
    values, indices, offsets, threshold = output
    ctx.mark_non_differentiable(indices, offsets, threshold)
    ctx.set_materialize_grads(False)
    rectified = values if ACTIVATIONS[activation] == "relu" else None
    ctx.save_for_backward(x, weight, indices, offsets, rectified)


def _backward(ctx, grad: Tensor | None, *_):
    if grad is None:
        return (None,) * 7
    x, weight, indices, offsets, rectified = ctx.saved_tensors
    if rectified is not None:
        grad = grad.masked_fill(rectified <= 0, 0)  # NaN is not <= 0: it keeps its gradient, as in torch.relu
    return *gradients(grad, x, weight, indices, offsets, ctx.needs_input_grad[:3]), *(None,) * 4


def _jvp(inputs, output, tangents) -> tuple[Tensor | None, None, None, None]:
    x, weight, _, _, activation, *_ = inputs
    values, indices, offsets, _ = output
    found = tangent(tangents[:3], x, weight, indices, offsets)
    if found is not None and ACTIVATIONS[activation] == "relu":
        found = found.masked_fill(values <= 0, 0)
    return found, None, None, None


batch_topk_encode = register(
    "batch_topk_encode(Tensor x, Tensor weight, Tensor? bias, SymInt total, int activation, "
    "Tensor? latent_scale, Tensor? latent_mask) "
    "-> (Tensor values, Tensor indices, Tensor offsets, Tensor threshold)",
    "x (N, D), weight (M, D), bias (M)?, latent_scale (M)?, latent_mask (M) bool? "
    "-> values (total), indices (total) int64, offsets (N + 1) int64, threshold () wide",
    reference=reference.batch_topk_encode,
    setup_context=_setup_context,
    backward=_backward,
    jvp=_jvp,
    options={"activation": ACTIVATIONS},
    check=_check,
)
