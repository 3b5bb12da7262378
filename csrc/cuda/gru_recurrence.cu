#include "cuda/gated_recurrence.h"

namespace fastsparse::cuda {

std::tuple<Tensor, Tensor> gru_recurrence(const Tensor& u, const Tensor& weight, const std::optional<Tensor>& h0,
                                          const std::optional<Tensor>& cu_seqlens, int64_t solver) {
  int64_t B = u.size(0), H = u.size(3), S = cu_seqlens ? cu_seqlens->size(0) - 1 : B;
  Tensor h = allocate(u, {B, u.size(1), H}, u.scalar_type()), passes = allocate(u, {S, H}, ScalarType::Int);
  solve_gated<GruCell, 1>("gru_recurrence", u, weight, std::nullopt, {h0}, cu_seqlens, solver, {h}, passes);
  return {h, passes};
}

FASTSPARSE_REGISTER(fastsparse_cuda, FASTSPARSE_DEVICE_KEY, gru_recurrence)

}  // namespace fastsparse::cuda
