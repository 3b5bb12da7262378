// How the gradients of the gated recurrences are launched.
#pragma once

#include <array>

#include "cuda/gated_backward.cuh"
#include "cuda/scan.h"

namespace fastsparse::cuda {

// A contiguous copy of what is there, where it isn't contiguous.
inline std::optional<Tensor> contiguous_if_there(const std::optional<Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return as_contiguous(*tensor, tensor->scalar_type());
}

// Of which gradients an op returns some: the others are empty, of shape (0,).
struct Needed { bool u, weights, state; };

template <int n> struct Gradients { Tensor u, weight, peephole; std::array<Tensor, n> first; };

// Starts, states and their gradients in the cell's order; peephole and d_peephole are the LSTM's alone.
template <template <typename> typename Form, int n>
Gradients<n> back_through_time(const char* name, const Tensor& u, const Tensor& weight,
                               const std::optional<Tensor>& peephole, const std::array<std::optional<Tensor>, n>& starts,
                               const std::optional<Tensor>& cu_seqlens, const std::array<Tensor, n>& states,
                               const std::array<std::optional<Tensor>, n>& gradients, Needed needs) {
  Call call(u);
  const ScalarType dtype = u.scalar_type();
  const int64_t B = u.size(0), T = u.size(1), H = u.size(3);
  std::optional<Tensor> bounds = contiguous_bounds(cu_seqlens), peepholes = contiguous_if_there(peephole);
  const Batch batch(B, T, H, bounds);
  auto output = [&](bool needed, std::initializer_list<int64_t> sizes) {
    return needed ? allocate(u, sizes, dtype) : allocate(u, {0}, dtype);
  };
  Gradients<n> found{output(needs.u, {B, T, 3, H}), output(needs.weights, {3, H}),
                     output(needs.weights && peephole, {2, H}), {}};
  for (Tensor& part : found.first) part = output(needs.state, {batch.S, H});
  if (!needs.u && !needs.weights && !needs.state) return found;

  Tensor inputs = as_contiguous(u, dtype), weights = as_contiguous(weight, dtype);
  std::array<std::optional<Tensor>, n> first, known, reaching;
  for (int j = 0; j < n; ++j) {
    first[j] = contiguous_if_there(starts[j]);
    known[j] = as_contiguous(states[j], dtype);
    reaching[j] = contiguous_if_there(gradients[j]);
  }
  with_type(dtype_of(u), [&](auto tag) {
    using E = typename decltype(tag)::type;
    using Steps = BackSteps<E, Form>;
    static_assert(Steps::kStates == n);
    auto at = [](const std::optional<Tensor>& tensor) { return tensor ? data<E>(*tensor) : nullptr; };
    Steps steps{};
    steps.u = data<E>(inputs);
    steps.weight = data<E>(weights), steps.peephole = at(peepholes);
    for (int j = 0; j < n; ++j) {
      steps.first[j] = at(first[j]), steps.states[j] = at(known[j]), steps.gradients[j] = at(reaching[j]);
      if (needs.state) steps.d_first[j] = mutable_data<E>(found.first[j]);
    }
    if (needs.u) steps.d_u = mutable_data<E>(found.u);
    ScanPlan<Steps> plan(call, batch, true);
    std::optional<Tensor> sums;
    if (needs.weights)
      sums = allocate(u, {plan.time.segments * Steps::kSums, plan.time.lines}, accumulator_of(dtype));
    plan.run(call, name, steps, u, sums ? &*sums : nullptr);
    if (sums)
      call.launch("gated_weights", gated_weights<E>, unsigned((H + kWarp - 1) / kWarp) * Steps::kSums,
                  kWarp * kWeightSlices, 0, data<Accumulator<E>>(*sums), mutable_data<E>(found.weight),
                  mutable_data<E>(found.peephole), batch.S, H, plan.time.segments, Steps::kSums);
  });
  return found;
}

}  // namespace fastsparse::cuda
