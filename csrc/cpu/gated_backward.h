// The gradient of a gated recurrence, in one pass against time.
//
// The states are known, so that all gates are computed again, each from the state before it; only what reaches a state,
// lambda[t] = d_h[t] + J[t + 1]^T lambda[t + 1], goes from step to step. Sums over time are taken in spans of steps, to
// keep their rounding small, and over the sequences of a group in their order.
#pragma once

#include "cells.h"
#include "dtype.h"
#include "cpu/isa.h"
#include "cpu/sequences.h"

namespace fastsparse {

struct GatedBackwardArgs {
  CellKind cell;
  Sequences sequences;
  Series u;                         // (B, T, 3, H)
  Series states[2], start[2];       // of the LSTM c and h: (B, T, H), and (S, H)
  Series d_states[2];               // (B, T, H)
  const void* weights[5];           // (H) each, as many as the cell has
  void* d_u;                        // (B, T, 3, H), or null
  void* d_weights;                  // (groups, weights, H) of the accumulation type, or null
  void* d_start[2];                 // (S, H), or null
  int64_t H;
  DType dtype;
};

// For the sequences of a group, and some channels.
FASTSPARSE_DECLARE_KERNEL(void gated_backward(const GatedBackwardArgs& args, int64_t group, Range sequences,
                                              Range channels))

}  // namespace fastsparse
