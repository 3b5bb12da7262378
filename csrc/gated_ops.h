// The ops of gated recurrences: which cell they are of, and in which order it has their tensors.
//
// Included inside of a backend's namespace, whose ops they become by what FASTSPARSE_GATED_OP(op) is there: hence no
// guard, and no includes.

// Every state (B, T, H), in the cell's order, then passes (S, H).
std::vector<Tensor> gated_recurrence(const GatedCall& call, int64_t solver);

// From every state (B, T, H) that was returned, and their gradients, or zeros.
GatedGradients gated_backward(const GatedCall& call, const std::vector<Tensor>& states,
                              const std::vector<std::optional<Tensor>>& gradients, Needed needs);

std::tuple<Tensor, Tensor> gru_recurrence(const Tensor& u, const Tensor& weight, const std::optional<Tensor>& h0,
                                          const std::optional<Tensor>& cu_seqlens, int64_t solver) {
  auto out = gated_recurrence({"gru_recurrence", CellKind::gru, u, {weight}, {h0}, cu_seqlens}, solver);
  return {out[0], out[1]};
}

std::tuple<Tensor, Tensor, Tensor> gru_recurrence_backward(const Tensor& u, const Tensor& weight,
                                                           const std::optional<Tensor>& h0,
                                                           const std::optional<Tensor>& cu_seqlens, const Tensor& h,
                                                           const Tensor& d_h, bool needs_u, bool needs_weight,
                                                           bool needs_h0) {
  GatedCall call{"gru_recurrence_backward", CellKind::gru, u, {weight}, {h0}, cu_seqlens};
  auto found = gated_backward(call, {h}, {d_h}, {needs_u, needs_weight, needs_h0});
  return {found.u, found.weights[0], found.starts[0]};
}

std::tuple<Tensor, Tensor, Tensor> lstm_recurrence(const Tensor& u, const Tensor& weight, const Tensor& peephole,
                                                   const std::optional<Tensor>& h0, const std::optional<Tensor>& c0,
                                                   const std::optional<Tensor>& cu_seqlens, int64_t solver) {
  GatedCall call{"lstm_recurrence", CellKind::lstm, u, {weight, peephole}, {c0, h0}, cu_seqlens};
  auto out = gated_recurrence(call, solver);
  return {out[1], out[0], out[2]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_recurrence_backward(
    const Tensor& u, const Tensor& weight, const Tensor& peephole, const std::optional<Tensor>& h0,
    const std::optional<Tensor>& c0, const std::optional<Tensor>& cu_seqlens, const Tensor& h, const Tensor& c,
    const std::optional<Tensor>& d_h, const std::optional<Tensor>& d_c, bool needs_u, bool needs_weights,
    bool needs_state) {
  GatedCall call{"lstm_recurrence_backward", CellKind::lstm, u, {weight, peephole}, {c0, h0}, cu_seqlens};
  auto found = gated_backward(call, {c, h}, {d_c, d_h}, {needs_u, needs_weights, needs_state});
  return {found.u, found.weights[0], found.weights[1], found.starts[1], found.starts[0]};
}

FASTSPARSE_GATED_OP(gru_recurrence)
FASTSPARSE_GATED_OP(gru_recurrence_backward)
FASTSPARSE_GATED_OP(lstm_recurrence)
FASTSPARSE_GATED_OP(lstm_recurrence_backward)
