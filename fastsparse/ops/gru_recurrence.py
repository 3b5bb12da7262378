"""``fastsparse::gru_recurrence``, and its gradient, an op that starts from inputs and states alone."""

import torch
from torch import Tensor

from fastsparse import reference
from fastsparse._options import SOLVERS
from fastsparse.ops._library import accumulated, register, register_backward
from fastsparse.ops.linear_recurrence import First, linear_recurrence
from fastsparse.reference._precision import accumulate
from fastsparse.reference.gru_recurrence import gates, jacobian


def _setup_context(ctx, inputs, output) -> None:
    u, weight, h0, cu_seqlens, _ = inputs
    h, passes = output
    ctx.mark_non_differentiable(passes)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u, weight, h0, cu_seqlens, h)


def _backward(ctx, d_h: Tensor | None, _):
    if d_h is None:
        return None, None, None, None, None
    wanted = ctx.needs_input_grad[:3]
    found = gru_recurrence_backward(*ctx.saved_tensors, d_h, *wanted)
    return *(grad if needed else None for grad, needed in zip(found, wanted, strict=True)), None, None


def _jvp(inputs, output, tangents) -> tuple[Tensor, None]:
    """A linear recurrence of the derivatives of a step: in h, and in what else enters it."""
    *inputs, cu_seqlens, _ = inputs
    u, weight, h0, h = (None if tensor is None else accumulate(tensor) for tensor in (*inputs, output[0]))
    t_u, t_weight, t_h0 = accumulated(tangents[:3], like=(u, weight, h0))
    before = First(h, cu_seqlens, False).before(h, h0)
    z, r, n = gates(before, u, weight)
    t_z, t_r, t_n = (t_u + t_weight * torch.stack((before, before, before * r), dim=-2)).unbind(-2)
    t_n = t_n + weight[2] * before * r * (1 - r) * t_r
    moved = (n - before) * z * (1 - z) * t_z + z * (1 - n * n) * t_n
    J = jacobian(before, u, weight)
    return linear_recurrence(J, moved, t_h0, False, cu_seqlens).to(output[0].dtype), None


# u (B, T, 3, H), weight (3, H), h0 (S, H), cu_seqlens (S + 1,) int64; h (B, T, H), passes (S, H) int32.
gru_recurrence = register(
    "gru_recurrence(Tensor u, Tensor weight, Tensor? h0, Tensor? cu_seqlens, int solver) "
    "-> (Tensor h, Tensor passes)",
    "u (B, T, 3, H), weight (3, H), h0 (S, H)?, cu_seqlens (S + 1) int64? "
    "-> h (B, T, H), passes (S, H) int32",
    reference=reference.gru_recurrence,
    setup_context=_setup_context,
    backward=_backward,
    jvp=_jvp,
    options={"solver": SOLVERS},
)


# h as gru_recurrence returned it, d_h in any strides. An output that isn't needed is empty, of shape (0,).
gru_recurrence_backward = register_backward(
    "gru_recurrence_backward(Tensor u, Tensor weight, Tensor? h0, Tensor? cu_seqlens, Tensor h, Tensor d_h, "
    "bool needs_u, bool needs_weight, bool needs_h0) -> (Tensor d_u, Tensor d_weight, Tensor d_h0)",
    "u (B, T, 3, H), weight (3, H), h0 (S, H)?, cu_seqlens (S + 1) int64?, h (B, T, H), d_h (B, T, H) "
    "-> d_u (B, T, 3, H) if needs_u, d_weight (3, H) if needs_weight, d_h0 (S, H) if needs_h0",
    reference=reference.gru_recurrence_backward,
)
