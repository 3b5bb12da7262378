#include "cuda/gated_recurrence.h"

namespace fastsparse::cuda {

std::tuple<Tensor, Tensor, Tensor> lstm_recurrence(const Tensor& u, const Tensor& weight, const Tensor& peephole,
                                                   const std::optional<Tensor>& h0, const std::optional<Tensor>& c0,
                                                   const std::optional<Tensor>& cu_seqlens, int64_t solver) {
  int64_t B = u.size(0), H = u.size(3), S = cu_seqlens ? cu_seqlens->size(0) - 1 : B;
  auto states = [&] { return allocate(u, {B, u.size(1), H}, u.scalar_type()); };
  Tensor h = states(), c = states(), passes = allocate(u, {S, H}, ScalarType::Int);
  solve_gated<LstmCell, 2>("lstm_recurrence", u, weight, peephole, {c0, h0}, cu_seqlens, solver, {c, h}, passes);
  return {h, c, passes};
}

FASTSPARSE_REGISTER(fastsparse_cuda, FASTSPARSE_DEVICE_KEY, lstm_recurrence)

}  // namespace fastsparse::cuda
