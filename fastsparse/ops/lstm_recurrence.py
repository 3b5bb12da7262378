"""``fastsparse::lstm_recurrence``, and its gradient, an op that starts from inputs and states alone."""

import torch
from torch import Tensor

from fastsparse import reference
from fastsparse._options import SOLVERS, option_at
from fastsparse.ops._library import register, register_backward


def _reference(*arguments):
    *arguments, solver = arguments
    return reference.lstm_recurrence(*arguments, option_at("lstm_recurrence", "solver", solver, SOLVERS))


def _fake(u, weight, peephole, h0, c0, cu_seqlens, solver):
    B, T, _, H = u.shape
    S = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return u.new_empty(B, T, H), u.new_empty(B, T, H), u.new_empty(S, H, dtype=torch.int32)


def _setup_context(ctx, inputs, output) -> None:
    *kept, _ = inputs
    h, c, passes = output
    ctx.mark_non_differentiable(passes)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*kept, h, c)


def _backward(ctx, d_h: Tensor | None, d_c: Tensor | None, _):
    wanted = ctx.needs_input_grad[:5]
    if d_h is None and d_c is None:
        return (None,) * 7
    needs = wanted[0], wanted[1] or wanted[2], wanted[3] or wanted[4]
    found = torch.ops.fastsparse.lstm_recurrence_backward.default(*ctx.saved_tensors, d_h, d_c, *needs)
    return *(grad if needed else None for grad, needed in zip(found, wanted, strict=True)), None, None


# u (B, T, 3, H), weight (3, H), peephole (2, H), h0 and c0 (S, H), cu_seqlens (S + 1,) int64; h and c
# (B, T, H), passes (S, H) int32.
lstm_recurrence = register(
    "lstm_recurrence(Tensor u, Tensor weight, Tensor peephole, Tensor? h0, Tensor? c0, Tensor? cu_seqlens, "
    "int solver) -> (Tensor h, Tensor c, Tensor passes)",
    form="u (B, T, 3, H), weight (3, H), peephole (2, H), h0 (S, H)?, c0 (S, H)?, cu_seqlens (S + 1) int64?",
    reference=_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _fake_backward(
    u, weight, peephole, h0, c0, cu_seqlens, h, c, d_h, d_c, needs_u, needs_weights, needs_state
):
    S = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (S, u.shape[-1]) if needs_state else (0,)
    return (
        u.new_empty(u.shape if needs_u else (0,)),
        u.new_empty(weight.shape if needs_weights else (0,)),
        u.new_empty(peephole.shape if needs_weights else (0,)),
        u.new_empty(state),
        u.new_empty(state),
    )


# h and c as lstm_recurrence returned them, d_h and d_c in any strides, not both None. Outputs that aren't
# needed are empty, of shape (0,); those of weight and peephole go together, and those of h0 and c0.
register_backward(
    "lstm_recurrence_backward(Tensor u, Tensor weight, Tensor peephole, Tensor? h0, Tensor? c0, "
    "Tensor? cu_seqlens, Tensor h, Tensor c, Tensor? d_h, Tensor? d_c, bool needs_u, bool needs_weights, "
    "bool needs_state) -> (Tensor d_u, Tensor d_weight, Tensor d_peephole, Tensor d_h0, Tensor d_c0)",
    form="u (B, T, 3, H), weight (3, H), peephole (2, H), h0 (S, H)?, c0 (S, H)?, cu_seqlens (S + "
    "1) int64?, h (B, T, H), c (B, T, H), d_h (B, T, H)?, d_c (B, T, H)?",
    reference=reference.lstm_recurrence_backward,
    fake=_fake_backward,
)
