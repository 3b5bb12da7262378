#include "cuda/gated_backward.h"

namespace fastsparse::cuda {

// A cell's states are c and h, in this order.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_recurrence_backward(
    const Tensor& u, const Tensor& weight, const Tensor& peephole, const std::optional<Tensor>& h0,
    const std::optional<Tensor>& c0, const std::optional<Tensor>& cu_seqlens, const Tensor& h, const Tensor& c,
    const std::optional<Tensor>& d_h, const std::optional<Tensor>& d_c, bool needs_u, bool needs_weights,
    bool needs_state) {
  auto found = back_through_time<LstmCell, 2>("lstm_recurrence_backward", u, weight, peephole, {c0, h0}, cu_seqlens,
                                              {c, h}, {d_c, d_h}, {needs_u, needs_weights, needs_state});
  return {found.u, found.weight, found.peephole, found.first[1], found.first[0]};
}

FASTSPARSE_REGISTER(fastsparse_cuda, FASTSPARSE_DEVICE_KEY, lstm_recurrence_backward)

}  // namespace fastsparse::cuda
