"""``fastsparse::spmm``: sparse code times dense matrix. Gradients: sddmm and spmm_t."""

from torch import Tensor

from fastsparse import ops, reference
from fastsparse.ops._library import register, total


def _backward(ctx, grad: Tensor):
    values, indices, weight, offsets = ctx.saved_tensors
    needs_values, _, needs_weight, _ = ctx.needs_input_grad
    d_values = ops.sddmm(grad, weight, indices, offsets) if needs_values else None
    d_weight = ops.spmm_t(values, indices, grad, weight.shape[0], offsets) if needs_weight else None
    return d_values, None, d_weight, None


def _jvp(inputs, output, tangents) -> Tensor:
    values, indices, weight, offsets = inputs
    t_values, _, t_weight, _ = tangents
    return total(
        None if t_values is None else ops.spmm(t_values, indices, weight, offsets),
        None if t_weight is None else ops.spmm(values, indices, t_weight, offsets),
    )


spmm = register(
    "spmm(Tensor values, Tensor indices, Tensor weight, Tensor? offsets) -> Tensor",
    "values (N, k), indices (N, k) int64 < M, weight (M, D) -> (N, D)"
    " | values (E), indices (E) int64 < M, weight (M, D), offsets (N + 1) int64 -> (N, D)",
    reference=reference.spmm,
    backward=_backward,
    jvp=_jvp,
)
