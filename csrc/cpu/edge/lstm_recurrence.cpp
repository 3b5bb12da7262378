#include "cpu/lstm_recurrence.h"

#include "cpu/edge/gated_recurrence.h"

namespace fastsparse::edge {

std::tuple<Tensor, Tensor, Tensor> lstm_recurrence(const Tensor& u, const Tensor& weight, const Tensor& peephole,
                                                   const std::optional<Tensor>& h0, const std::optional<Tensor>& c0,
                                                   const std::optional<Tensor>& cu_seqlens, int64_t solver) {
  GatedKernels kernels{FASTSPARSE_KERNEL(lstm_recurrence), FASTSPARSE_KERNEL(lstm_recurrence_by_newton),
                       FASTSPARSE_KERNEL(lstm_recurrence_by_shooting)};
  auto out = gated_recurrence("lstm_recurrence", kernels, u, {weight, peephole}, {c0, h0}, cu_seqlens, solver);
  return {out[1], out[0], out[2]};
}

FASTSPARSE_REGISTER(fastsparse, CPU, lstm_recurrence)

}  // namespace fastsparse::edge
