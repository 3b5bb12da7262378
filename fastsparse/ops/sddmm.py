"""``fastsparse::sddmm``: dense times dense where a code is nonzero. Gradients: spmm and spmm_t."""

from torch import Tensor

from fastsparse import ops, reference
from fastsparse.ops._library import register, total


def _backward(ctx, grad: Tensor):
    x, weight, indices, offsets = ctx.saved_tensors
    needs_x, needs_weight, _, _ = ctx.needs_input_grad
    d_x = ops.spmm(grad, indices, weight, offsets) if needs_x else None
    d_weight = ops.spmm_t(grad, indices, x, weight.shape[0], offsets) if needs_weight else None
    return d_x, d_weight, None, None


def _jvp(inputs, output, tangents) -> Tensor:
    x, weight, indices, offsets = inputs
    t_x, t_weight, *_ = tangents
    return total(
        None if t_x is None else ops.sddmm(t_x, weight, indices, offsets),
        None if t_weight is None else ops.sddmm(x, t_weight, indices, offsets),
    )


sddmm = register(
    "sddmm(Tensor x, Tensor weight, Tensor indices, Tensor? offsets) -> Tensor",
    "x (N, D), weight (M, D), indices (N, k) int64 < M -> (N, k)"
    " | x (N, D), weight (M, D), indices (E) int64 < M, offsets (N + 1) int64 -> (E)",
    reference=reference.sddmm,
    backward=_backward,
    jvp=_jvp,
)
