"""``fastsparse::lstm_recurrence``, and its gradient."""

from fastsparse import reference
from fastsparse.ops._gated import register_gated, register_gated_backward
from fastsparse.reference.lstm_recurrence import CELL

# h and c as lstm_recurrence returned them, d_h and d_c in any strides, not both None.
lstm_recurrence_backward = register_gated_backward(
    "lstm_recurrence_backward(Tensor u, Tensor weight, Tensor peephole, Tensor? h0, Tensor? c0, "
    "Tensor? cu_seqlens, Tensor h, Tensor c, Tensor? d_h, Tensor? d_c, bool needs_u, bool needs_weights, "
    "bool needs_state) -> (Tensor d_u, Tensor d_weight, Tensor d_peephole, Tensor d_h0, Tensor d_c0)",
    form="u (B, T, 3, H), weight (3, H), peephole (2, H), h0 (S, H)?, c0 (S, H)?, cu_seqlens (S + "
    "1) int64?, h (B, T, H), c (B, T, H), d_h (B, T, H)?, d_c (B, T, H)?",
    cell=CELL,
    reference=reference.lstm_recurrence_backward,
)

# u (B, T, 3, H), weight (3, H), peephole (2, H), h0 and c0 (S, H), cu_seqlens (S + 1,) int64; h and c
# (B, T, H), passes (S, H) int32.
lstm_recurrence = register_gated(
    "lstm_recurrence(Tensor u, Tensor weight, Tensor peephole, Tensor? h0, Tensor? c0, Tensor? cu_seqlens, "
    "int solver) -> (Tensor h, Tensor c, Tensor passes)",
    form="u (B, T, 3, H), weight (3, H), peephole (2, H), h0 (S, H)?, c0 (S, H)?, cu_seqlens (S + 1) int64?",
    cell=CELL,
    reference=reference.lstm_recurrence,
    backward=lstm_recurrence_backward,
)
