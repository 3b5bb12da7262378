#include "cpu/gru_recurrence.h"

#include "cpu/edge/gated_recurrence.h"

namespace fastsparse::edge {

std::tuple<Tensor, Tensor> gru_recurrence(const Tensor& u, const Tensor& weight, const std::optional<Tensor>& h0,
                                          const std::optional<Tensor>& cu_seqlens, int64_t solver) {
  GatedKernels kernels{FASTSPARSE_KERNEL(gru_recurrence), FASTSPARSE_KERNEL(gru_recurrence_by_newton),
                       FASTSPARSE_KERNEL(gru_recurrence_by_shooting)};
  auto out = gated_recurrence("gru_recurrence", kernels, u, {weight}, {h0}, cu_seqlens, solver);
  return {out[0], out[1]};
}

FASTSPARSE_REGISTER(fastsparse, CPU, gru_recurrence)

}  // namespace fastsparse::edge
