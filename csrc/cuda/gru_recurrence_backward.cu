#include "cuda/gated_backward.h"

namespace fastsparse::cuda {

std::tuple<Tensor, Tensor, Tensor> gru_recurrence_backward(const Tensor& u, const Tensor& weight,
                                                           const std::optional<Tensor>& h0,
                                                           const std::optional<Tensor>& cu_seqlens, const Tensor& h,
                                                           const Tensor& d_h, bool needs_u, bool needs_weight,
                                                           bool needs_h0) {
  auto found = back_through_time<GruCell, 1>("gru_recurrence_backward", u, weight, std::nullopt, {h0}, cu_seqlens, {h},
                                             {d_h}, {needs_u, needs_weight, needs_h0});
  return {found.u, found.weight, found.first[0]};
}

FASTSPARSE_REGISTER(fastsparse_cuda, FASTSPARSE_DEVICE_KEY, gru_recurrence_backward)

}  // namespace fastsparse::cuda
