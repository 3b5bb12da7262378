#include "cpu/gru_recurrence_backward.h"

#include "cpu/edge/recurrence_backward.h"

namespace fastsparse::edge {

std::tuple<Tensor, Tensor, Tensor> gru_recurrence_backward(const Tensor& u, const Tensor& weight,
                                                           const std::optional<Tensor>& h0,
                                                           const std::optional<Tensor>& cu_seqlens, const Tensor& h,
                                                           const Tensor& d_h, bool needs_u, bool needs_weight,
                                                           bool needs_h0) {
  Tensor d_weight, d_h0;
  std::optional<Tensor> d_states = d_h;
  Tensor d_u = recurrence_backward("gru_recurrence_backward", FASTSPARSE_KERNEL(gru_recurrence_backward), u,
                                   {{weight, d_weight}}, {{h, h0, d_states, d_h0}}, cu_seqlens, needs_u, needs_weight,
                                   needs_h0);
  return {d_u, d_weight, d_h0};
}

FASTSPARSE_REGISTER(fastsparse, CPU, gru_recurrence_backward)

}  // namespace fastsparse::edge
