#include "cuda/gated_backward.cuh"

#include "cuda/scan.h"
#include "gated.h"

namespace fastsparse::cuda {

namespace {

template <typename T, template <typename> typename Form>
void back(const Call& call, const GatedCall& given, const std::vector<Tensor>& states,
          const std::vector<std::optional<Tensor>>& gradients, Needed needs, const GatedGradients& found) {
  using Steps = BackSteps<T, Form>;
  const Tensor& u = given.u;
  std::vector<Tensor> kept;
  auto contiguous = [&](const std::optional<Tensor>& tensor) -> const T* {
    return tensor ? data<T>(kept.emplace_back(as_contiguous(*tensor, u.scalar_type()))) : nullptr;
  };
  std::optional<Tensor> bounds = contiguous_bounds(given.cu_seqlens);
  const Batch batch(u.size(0), u.size(1), u.size(3), bounds);
  Steps steps{};
  steps.u = contiguous(u);
  steps.weight = contiguous(given.weights[0]);
  if (given.weights.size() > 1) steps.peephole = contiguous(given.weights[1]);
  for (int j = 0; j < Steps::kStates; ++j) {
    steps.first[j] = contiguous(given.starts[j]), steps.states[j] = contiguous(states[j]);
    steps.gradients[j] = contiguous(gradients[j]);
    if (needs.starts) steps.d_first[j] = mutable_data<T>(found.starts[j]);
  }
  if (needs.u) steps.d_u = mutable_data<T>(found.u);
  ScanPlan<Steps> plan(call, batch, true);
  std::optional<Tensor> sums;
  if (needs.weights)
    sums = allocate(u, {plan.time.segments * Steps::kSums, plan.time.lines}, accumulator_of(u.scalar_type()));
  plan.run(call, given.op, steps, u, sums ? &*sums : nullptr);
  if (sums)
    call.launch("gated_weights", gated_weights<T>, unsigned((batch.H + kWarp - 1) / kWarp) * Steps::kSums,
                kWarp * kWeightSlices, 0, data<Accumulator<T>>(*sums), mutable_data<T>(found.weights[0]),
                found.weights.size() > 1 ? mutable_data<T>(found.weights[1]) : nullptr, batch.S, batch.H,
                plan.time.segments, Steps::kSums);
}

}  // namespace

GatedGradients gated_backward(const GatedCall& given, const std::vector<Tensor>& states,
                              const std::vector<std::optional<Tensor>>& gradients, Needed needs) {
  const Tensor& u = given.u;
  Call call(u);
  const int64_t B = u.size(0), H = u.size(3), S = given.cu_seqlens ? given.cu_seqlens->size(0) - 1 : B;
  auto output = [&](bool needed, std::initializer_list<int64_t> sizes) {
    return needed ? allocate(u, sizes, u.scalar_type()) : allocate(u, {0}, u.scalar_type());
  };
  GatedGradients found{output(needs.u, {B, u.size(1), 3, H}), {}, {}};
  for (const Tensor& weight : given.weights) found.weights.push_back(output(needs.weights, {weight.size(0), H}));
  for (size_t j = 0; j < states.size(); ++j) found.starts.push_back(output(needs.starts, {S, H}));
  if (needs.u || needs.weights || needs.starts)
    with_cell(given.cell, [&]<template <typename> typename Form>() {
      with_type(dtype_of(u), [&](auto tag) {
        back<typename decltype(tag)::type, Form>(call, given, states, gradients, needs, found);
      });
    });
  return found;
}

}  // namespace fastsparse::cuda
