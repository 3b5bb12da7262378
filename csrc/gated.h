// A call of a gated recurrence, whatever its cell, between the op that it came by (gated_ops.h) and a backend's edge.
#pragma once

#include <optional>
#include <vector>

#include "cells.h"
#include "tensors.h"

namespace fastsparse {

struct GatedCall {
  const char* op;
  CellKind cell;
  const Tensor& u;                            // (B, T, 3, H)
  std::vector<Tensor> weights;                // (rows, H), which one after the other are the cell's
  std::vector<std::optional<Tensor>> starts;  // (S, H) of each state, in the cell's order, or zeros
  const std::optional<Tensor>& cu_seqlens;    // (S + 1,), or one sequence a row
};

// Of which gradients an op returns some: the others are empty, of shape (0,).
struct Needed { bool u, weights, starts; };

// In the order of GatedCall.
struct GatedGradients {
  Tensor u;
  std::vector<Tensor> weights, starts;
};

}  // namespace fastsparse
