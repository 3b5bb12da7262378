"""``fastsparse::gru_recurrence``, and its gradient."""

from fastsparse import reference
from fastsparse.ops._gated import SOURCE, register_gated
from fastsparse.ops._library import register_backward
from fastsparse.reference.gru_recurrence import CELL

# h as gru_recurrence returned it, d_h in any strides.
gru_recurrence_backward = register_backward(
    "gru_recurrence_backward(Tensor u, Tensor weight, Tensor? h0, Tensor? cu_seqlens, Tensor h, Tensor d_h, "
    "bool needs_u, bool needs_weight, bool needs_h0) -> (Tensor d_u, Tensor d_weight, Tensor d_h0)",
    "u (B, T, 3, H), weight (3, H), h0 (S, H)?, cu_seqlens (S + 1) int64?, h (B, T, H), d_h (B, T, H) "
    "-> d_u (B, T, 3, H) if needs_u, d_weight (3, H) if needs_weight, d_h0 (S, H) if needs_h0",
    reference=reference.gru_recurrence_backward,
    source=SOURCE,
)

gru_recurrence = register_gated(
    "gru_recurrence(Tensor u, Tensor weight, Tensor? h0, Tensor? cu_seqlens, int solver) "
    "-> (Tensor h, Tensor passes)",
    "u (B, T, 3, H), weight (3, H), h0 (S, H)?, cu_seqlens (S + 1) int64? "
    "-> h (B, T, H), passes (S, H) int32",
    cell=CELL,
    reference=reference.gru_recurrence,
    backward=gru_recurrence_backward,
)
