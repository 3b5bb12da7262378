#include "cpu/lstm_recurrence_backward.h"

#include "cpu/edge/recurrence_backward.h"

namespace fastsparse::edge {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_recurrence_backward(
    const Tensor& u, const Tensor& weight, const Tensor& peephole, const std::optional<Tensor>& h0,
    const std::optional<Tensor>& c0, const std::optional<Tensor>& cu_seqlens, const Tensor& h, const Tensor& c,
    const std::optional<Tensor>& d_h, const std::optional<Tensor>& d_c, bool needs_u, bool needs_weights,
    bool needs_state) {
  Tensor d_weight, d_peephole, d_h0, d_c0;
  Tensor d_u = recurrence_backward("lstm_recurrence_backward", FASTSPARSE_KERNEL(lstm_recurrence_backward), u,
                                   {{weight, d_weight}, {peephole, d_peephole}}, {{c, c0, d_c, d_c0}, {h, h0, d_h, d_h0}},
                                   cu_seqlens, needs_u, needs_weights, needs_state);
  return {d_u, d_weight, d_peephole, d_h0, d_c0};
}

FASTSPARSE_REGISTER(fastsparse, CPU, lstm_recurrence_backward)

}  // namespace fastsparse::edge
