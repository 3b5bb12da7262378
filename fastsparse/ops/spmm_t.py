"""``fastsparse::spmm_t``: transposed sparse code times dense matrix. Gradients: sddmm and spmm."""

from torch import Tensor

from fastsparse import ops, reference
from fastsparse._validation import check_range
from fastsparse.ops._library import register, total


def _reference(values: Tensor, indices: Tensor, x: Tensor, num_latents: int) -> Tensor:
    check_range("spmm_t", indices, num_latents)
    return reference.spmm_t(values, indices, x, num_latents)


def _fake(values: Tensor, indices: Tensor, x: Tensor, num_latents: int) -> Tensor:
    return x.new_empty(num_latents, x.shape[1])


def _setup_context(ctx, inputs, output) -> None:
    values, indices, x, _ = inputs
    ctx.save_for_backward(values, indices, x)


def _backward(ctx, grad: Tensor):
    values, indices, x = ctx.saved_tensors
    needs_values, _, needs_x, _ = ctx.needs_input_grad
    d_values = ops.sddmm(x, grad, indices) if needs_values else None
    d_x = ops.spmm(values, indices, grad) if needs_x else None
    return d_values, None, d_x, None


def _jvp(inputs, output, tangents) -> Tensor:
    values, indices, x, num_latents = inputs
    t_values, _, t_x, _ = tangents
    return total(
        None if t_values is None else ops.spmm_t(t_values, indices, x, num_latents),
        None if t_x is None else ops.spmm_t(values, indices, t_x, num_latents),
    )


spmm_t = register(
    "spmm_t(Tensor values, Tensor indices, Tensor x, SymInt num_latents) -> Tensor",
    form="values (N, k), indices (N, k) int64, x (N, D)",
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    jvp=_jvp,
)
