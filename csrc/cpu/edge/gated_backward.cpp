#include "cpu/gated_backward.h"

#include <algorithm>
#include <vector>

#include "cpu/edge/sequences.h"
#include "gated.h"

namespace fastsparse::edge {

namespace {

// Sums over the sequences of a group are one number: so many groups, whatever the number of threads.
constexpr int64_t kGroups = 64;

// Rows [first, first + rows) of parts (groups, all rows, H), summed over the groups in order, rounded once.
Tensor sum_of_groups(const Tensor& parts, int64_t first, int64_t rows, ScalarType dtype) {
  int64_t H = parts.size(2), count = rows * H, stride = parts.size(1) * H;
  std::vector<double> sums(count);
  auto add = [&](const auto* from) {
    for (int64_t group = 0; group < parts.size(0); ++group)
      for (int64_t i = 0; i < count; ++i) sums[i] += double(from[group * stride + first * H + i]);
  };
  if (parts.scalar_type() == ScalarType::Double) add(parts.const_data_ptr<double>());
  else add(parts.const_data_ptr<float>());
  Tensor exact = allocate({rows, H}, ScalarType::Double);
  std::copy(sums.begin(), sums.end(), static_cast<double*>(exact.mutable_data_ptr()));
  return as_contiguous(exact, dtype);
}

}  // namespace

GatedGradients gated_backward(const GatedCall& call, const std::vector<Tensor>& states,
                              const std::vector<std::optional<Tensor>>& gradients, Needed needs) {
  InFloatMode mode(Subnormals::as_asked);
  const Tensor& u = call.u;
  ScalarType dtype = u.scalar_type(), accumulator = accumulator_of(dtype);
  int64_t B = u.size(0), T = u.size(1), H = u.size(3), element = int64_t(u.element_size());
  std::vector<Tensor> kept;  // what the pointers point to
  auto keep = [&](const Tensor& tensor) -> const Tensor& { return kept.emplace_back(tensor); };
  auto output = [&](bool needed, std::initializer_list<int64_t> sizes, void*& to) {
    Tensor tensor = needed ? allocate(sizes, dtype) : allocate({0}, dtype);
    if (needed) to = tensor.mutable_data_ptr();
    return tensor;
  };
  Tensor bounds;
  GatedBackwardArgs args{};
  args.cell = call.cell;
  args.sequences = sequences_of(call.op, call.cu_seqlens, B, T, bounds);
  args.u = series_of(keep(with_unit_channels(u)));
  args.H = H;
  args.dtype = dtype_of(u);
  int64_t S = args.sequences.count, groups = std::min(S, kGroups), rows = 0;

  GatedGradients found;
  std::vector<char> zeros(H * element);
  Series nothing{zeros.data(), 0, 0, 0, 0};
  for (size_t i = 0; i < states.size(); ++i) {
    args.states[i] = series_of(keep(with_unit_channels(states[i])));
    args.start[i] = call.starts[i] ? states_of(keep(with_unit_channels(*call.starts[i]))) : nothing;
    args.d_states[i] = gradients[i] ? series_of(keep(with_unit_channels(*gradients[i]))) : nothing;
    found.starts.push_back(output(needs.starts, {S, H}, args.d_start[i]));
  }
  for (const Tensor& weight : call.weights) {
    auto* data = static_cast<const char*>(keep(as_contiguous(weight, dtype)).const_data_ptr());
    for (int64_t row = 0; row < weight.size(0); ++row) args.weights[rows++] = data + row * H * element;
  }
  found.u = output(needs.u, {B, T, 3, H}, args.d_u);
  prefer_huge_pages(found.u.mutable_data_ptr(), size_t(found.u.numel() * element));
  Tensor sums = needs.weights ? allocate({groups, rows, H}, accumulator) : allocate({0}, accumulator);
  if (needs.weights) args.d_weights = sums.mutable_data_ptr();

  if (S > 0 && H > 0) {
    int64_t bytes = 20 * element * B * T / groups;
    auto run = FASTSPARSE_KERNEL(gated_backward);
    parallel_channels(groups, H, bytes, {128, 4}, [&](int64_t group, Range channels) {
      run(args, group, {group * S / groups, (group + 1) * S / groups}, channels);
    });
  }
  rows = 0;
  for (const Tensor& weight : call.weights) {
    int64_t count = weight.size(0);
    found.weights.push_back(needs.weights ? sum_of_groups(sums, rows, count, dtype) : allocate({0}, dtype));
    rows += count;
  }
  return found;
}

}  // namespace fastsparse::edge
