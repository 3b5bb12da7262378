"""``fastsparse::lstm_recurrence``, and its gradient."""

from fastsparse import reference
from fastsparse.ops._gated import SOURCE, register_gated
from fastsparse.ops._library import register_backward
from fastsparse.reference.lstm_recurrence import CELL

# h and c as lstm_recurrence returned them, d_h and d_c in any strides, not both None.
lstm_recurrence_backward = register_backward(
    "lstm_recurrence_backward(Tensor u, Tensor weight, Tensor peephole, Tensor? h0, Tensor? c0, "
    "Tensor? cu_seqlens, Tensor h, Tensor c, Tensor? d_h, Tensor? d_c, bool needs_u, bool needs_weights, "
    "bool needs_state) -> (Tensor d_u, Tensor d_weight, Tensor d_peephole, Tensor d_h0, Tensor d_c0)",
    "u (B, T, 3, H), weight (3, H), peephole (2, H), h0 (S, H)?, c0 (S, H)?, cu_seqlens (S + 1) int64?, "
    "h (B, T, H), c (B, T, H), d_h (B, T, H)?, d_c (B, T, H)? -> d_u (B, T, 3, H) if needs_u, "
    "d_weight (3, H) if needs_weights, d_peephole (2, H) if needs_weights, d_h0 (S, H) if needs_state, "
    "d_c0 (S, H) if needs_state",
    reference=reference.lstm_recurrence_backward,
    source=SOURCE,
)

lstm_recurrence = register_gated(
    "lstm_recurrence(Tensor u, Tensor weight, Tensor peephole, Tensor? h0, Tensor? c0, Tensor? cu_seqlens, "
    "int solver) -> (Tensor h, Tensor c, Tensor passes)",
    "u (B, T, 3, H), weight (3, H), peephole (2, H), h0 (S, H)?, c0 (S, H)?, cu_seqlens (S + 1) int64? "
    "-> h (B, T, H), c (B, T, H), passes (S, H) int32",
    cell=CELL,
    reference=reference.lstm_recurrence,
    backward=lstm_recurrence_backward,
)
