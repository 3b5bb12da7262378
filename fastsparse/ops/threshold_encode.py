"""``fastsparse::threshold_encode``: encoding by thresholds. Gradients, by its entries: spmm, spmm_t."""

from torch import Tensor

from fastsparse import reference
from fastsparse._validation import capturing, check_thresholds
from fastsparse.ops._encoders import gradients, tangent
from fastsparse.ops._library import register


def _check(x, weight, bias, threshold, absolute, latent_mask, max_entries) -> None:
    check_thresholds("threshold_encode", threshold)
    if max_entries is None and capturing(x):
        raise RuntimeError(
            "threshold_encode: max_entries must be given while a CUDA graph is being captured, got None"
        )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, *_ = inputs
    _, indices, offsets = output
    ctx.mark_non_differentiable(indices, offsets)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, indices, offsets)


def _backward(ctx, grad: Tensor | None, *_):
    if grad is None:
        return (None,) * 7
    x, weight, indices, offsets = ctx.saved_tensors
    found = gradients(grad.to(x.dtype), x, weight, indices, offsets, ctx.needs_input_grad[:3])
    return *found, *(None,) * 4


def _jvp(inputs, output, tangents) -> tuple[Tensor | None, None, None]:
    x, weight, *_ = inputs
    values, indices, offsets = output
    found = tangent(tangents[:3], x, weight, indices, offsets)
    return None if found is None else found.to(values.dtype), None, None


threshold_encode = register(
    "threshold_encode(Tensor x, Tensor weight, Tensor? bias, Tensor threshold, bool absolute, "
    "Tensor? latent_mask, SymInt? max_entries) -> (Tensor values, Tensor indices, Tensor offsets)",
    "x (N, D), weight (M, D), bias (M)?, threshold (M) wide, latent_mask (M) bool? "
    "-> values (E) wide, indices (E) int64, offsets (N + 1) int64",
    reference=reference.threshold_encode,
    setup_context=_setup_context,
    backward=_backward,
    jvp=_jvp,
    check=_check,
)
