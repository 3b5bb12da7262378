"""``fastsparse::lstm_recurrence``, and its gradient, an op that starts from inputs and states alone."""

import torch
from torch import Tensor

from fastsparse import reference
from fastsparse._options import SOLVERS
from fastsparse.ops._library import accumulated, register, register_backward
from fastsparse.ops.linear_recurrence import First, linear_recurrence
from fastsparse.reference._precision import accumulate
from fastsparse.reference.lstm_recurrence import gates, jacobian


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
    found = lstm_recurrence_backward(*ctx.saved_tensors, d_h, d_c, *needs)
    return *(grad if needed else None for grad, needed in zip(found, wanted, strict=True)), None, None


def _jvp(inputs, output, tangents) -> tuple[Tensor, Tensor, None]:
    """As of gru_recurrence, of pairs (c, h)."""
    *inputs, cu_seqlens, _ = inputs
    inputs = [None if tensor is None else accumulate(tensor) for tensor in inputs]
    u, weight, peephole, h0, c0 = inputs
    t_u, t_weight, t_peephole, t_h0, t_c0 = accumulated(tangents[:5], like=inputs)
    states = [accumulate(state) for state in output[:2]]
    first = First(states[0], cu_seqlens, False)
    h, c = (first.before(state, start) for state, start in zip(states, (h0, c0), strict=True))
    before = torch.stack((c, h), dim=-2)
    f, g, after, o = gates(before, u, weight, peephole)
    t_f, t_o, t_g = (t_u + t_weight * h.unsqueeze(-2)).unbind(-2)
    t_f = f * (1 - f) * (t_f + t_peephole[0] * c)
    t_after = t_f * (c - g) + (1 - f) * (1 - g * g) * t_g
    t_o = o * (1 - o) * (t_o + t_peephole[1] * after + peephole[1] * t_after)
    squashed = torch.tanh(after)
    moved = torch.stack((t_after, t_o * squashed + o * (1 - squashed * squashed) * t_after), dim=-2)
    start = _pair(t_c0, t_h0)
    t_states = linear_recurrence(jacobian(before, u, weight, peephole), moved, start, False, cu_seqlens)
    t_c, t_h = t_states.to(output[0].dtype).unbind(-2)
    return t_h, t_c, None


def _pair(c: Tensor | None, h: Tensor | None) -> Tensor | None:
    """(S, 2, H), zeros for the one that there isn't."""
    if c is None and h is None:
        return None
    return torch.stack((torch.zeros_like(h) if c is None else c, torch.zeros_like(c) if h is None else h), -2)


# u (B, T, 3, H), weight (3, H), peephole (2, H), h0 and c0 (S, H), cu_seqlens (S + 1,) int64; h and c
# (B, T, H), passes (S, H) int32.
lstm_recurrence = register(
    "lstm_recurrence(Tensor u, Tensor weight, Tensor peephole, Tensor? h0, Tensor? c0, Tensor? cu_seqlens, "
    "int solver) -> (Tensor h, Tensor c, Tensor passes)",
    "u (B, T, 3, H), weight (3, H), peephole (2, H), h0 (S, H)?, c0 (S, H)?, cu_seqlens (S + 1) int64? "
    "-> h (B, T, H), c (B, T, H), passes (S, H) int32",
    reference=reference.lstm_recurrence,
    setup_context=_setup_context,
    backward=_backward,
    jvp=_jvp,
    options={"solver": SOLVERS},
)


# h and c as lstm_recurrence returned them, d_h and d_c in any strides, not both None. Outputs that aren't
# needed are empty, of shape (0,); those of weight and peephole go together, and those of h0 and c0.
lstm_recurrence_backward = register_backward(
    "lstm_recurrence_backward(Tensor u, Tensor weight, Tensor peephole, Tensor? h0, Tensor? c0, "
    "Tensor? cu_seqlens, Tensor h, Tensor c, Tensor? d_h, Tensor? d_c, bool needs_u, bool needs_weights, "
    "bool needs_state) -> (Tensor d_u, Tensor d_weight, Tensor d_peephole, Tensor d_h0, Tensor d_c0)",
    "u (B, T, 3, H), weight (3, H), peephole (2, H), h0 (S, H)?, c0 (S, H)?, cu_seqlens (S + 1) int64?, "
    "h (B, T, H), c (B, T, H), d_h (B, T, H)?, d_c (B, T, H)? -> d_u (B, T, 3, H) if needs_u, "
    "d_weight (3, H) if needs_weights, d_peephole (2, H) if needs_weights, d_h0 (S, H) if needs_state, "
    "d_c0 (S, H) if needs_state",
    reference=reference.lstm_recurrence_backward,
)
