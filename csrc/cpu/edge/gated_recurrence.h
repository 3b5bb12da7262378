// What the GRU and the LSTM have in common where PyTorch's tensors end.
#pragma once

#include <optional>
#include <vector>

#include "cpu/edge/sequences.h"
#include "cpu/gated_recurrence.h"
#include "solvers.h"

namespace fastsparse::edge {

// Of one recurrence, at the level that runs.
struct GatedKernels {
  void (*sequential)(const GatedRecurrenceArgs& args, Range sequences, Range channels);
  void (*newton)(const GatedRecurrenceArgs& args, int64_t sequence, Range channels, void* scratch);
  decltype(newton) shooting;
};

// Runs u (B, T, 3, H), with weights (rows, H), which one after the other are those of csrc/cells.h, and for every
// state a start (S, H) or none. Returns every state (B, T, H), then passes (S, H).
std::vector<Tensor> gated_recurrence(const char* op, const GatedKernels& kernels, const Tensor& u,
                                     const std::vector<Tensor>& weights,
                                     const std::vector<std::optional<Tensor>>& start,
                                     const std::optional<Tensor>& cu_seqlens, int64_t solver);

}  // namespace fastsparse::edge
