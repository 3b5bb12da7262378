// What the gradients of the gated recurrences have in common where tensors become pointers.
#pragma once

#include "cpu/edge/sequences.h"
#include "cpu/recurrence_backward.h"

namespace fastsparse::edge {

// One of a cell's states: what the recurrence returned, the first, and the gradients of both.
struct State {
  const Tensor& states;                   // (B, T, H)
  const std::optional<Tensor>& start;     // (S, H); zeros where there is none
  const std::optional<Tensor>& d_states;  // (B, T, H); zeros where there is none
  Tensor& d_start;                        // set to (S, H), or (0)
};

// Rows of weights, of one tensor (rows, H), and their gradient, which is set to (rows, H), or (0).
struct Weights {
  const Tensor& values;
  Tensor& gradient;
};

using RecurrenceBackward = void (*)(const RecurrenceBackwardArgs&, int64_t group, Range sequences, Range channels);

// Returns the gradient of u, (B, T, 3, H), or (0).
Tensor recurrence_backward(const char* op, RecurrenceBackward run, const Tensor& u,
                           std::initializer_list<Weights> weights, std::initializer_list<State> states,
                           const std::optional<Tensor>& cu_seqlens, bool needs_u, bool needs_weights, bool needs_start);

}  // namespace fastsparse::edge
