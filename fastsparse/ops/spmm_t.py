"""``fastsparse::spmm_t``: transposed sparse code times dense matrix. Gradients: sddmm and spmm."""

from torch import Tensor

from fastsparse import ops, reference
from fastsparse.ops._library import register, total


def _backward(ctx, grad: Tensor):
    values, indices, x, offsets = ctx.saved_tensors
    needs_values, _, needs_x, *_ = ctx.needs_input_grad
    d_values = ops.sddmm(x, grad, indices, offsets) if needs_values else None
    d_x = ops.spmm(values, indices, grad, offsets) if needs_x else None
    return d_values, None, d_x, None, None


def _jvp(inputs, output, tangents) -> Tensor:
    values, indices, x, num_latents, offsets = inputs
    t_values, _, t_x, *_ = tangents
    return total(
        None if t_values is None else ops.spmm_t(t_values, indices, x, num_latents, offsets),
        None if t_x is None else ops.spmm_t(values, indices, t_x, num_latents, offsets),
    )


spmm_t = register(
    "spmm_t(Tensor values, Tensor indices, Tensor x, SymInt num_latents, Tensor? offsets) -> Tensor",
    "values (N, k), indices (N, k) int64 < num_latents, x (N, D) -> (num_latents, D)"
    " | values (E), indices (E) int64 < num_latents, x (N, D), offsets (N + 1) int64 -> (num_latents, D)",
    reference=reference.spmm_t,
    backward=_backward,
    jvp=_jvp,
)
