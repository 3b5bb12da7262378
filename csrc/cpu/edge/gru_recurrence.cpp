#include "cpu/gru_recurrence.h"

#include "cpu/edge/gated_recurrence.h"

namespace fastsparse::edge {

std::tuple<Tensor, Tensor> gru_recurrence(const Tensor& u, const Tensor& weight, const std::optional<Tensor>& h0,
                                          const std::optional<Tensor>& cu_seqlens, const std::string& solver) {
  GatedKernels kernels{FASTSPARSE_KERNEL(gru_recurrence), FASTSPARSE_KERNEL(gru_recurrence_by_newton),
                       FASTSPARSE_KERNEL(gru_recurrence_by_shooting)};
  auto out = gated_recurrence("gru_recurrence", kernels, u, {weight}, {h0}, cu_seqlens, solver);
  return {out[0], out[1]};
}

STABLE_TORCH_LIBRARY_IMPL(fastsparse, CPU, m) { m.impl("gru_recurrence", TORCH_BOX(&gru_recurrence)); }

}  // namespace fastsparse::edge
