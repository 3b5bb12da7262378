#include "cpu/edge/recurrence_backward.h"

#include <algorithm>
#include <vector>

namespace fastsparse::edge {

namespace {

// Sums over the sequences of a group are one number: so many groups, whatever the number of threads.
constexpr int64_t kGroups = 64;

// The (rows, H) sums of `groups` parts, `stride` numbers from one to the next, in order, rounded once.
template <typename C> Tensor sum_of_groups(const C* parts, int64_t groups, int64_t stride, int64_t rows, int64_t H,
                                           ScalarType dtype) {
  int64_t count = rows * H;
  std::vector<double> sums(count);
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t i = 0; i < count; ++i) sums[i] += double(parts[group * stride + i]);
  Tensor exact = allocate({rows, H}, ScalarType::Double);
  std::copy(sums.begin(), sums.end(), static_cast<double*>(exact.mutable_data_ptr()));
  return as_contiguous(exact, dtype);
}

}  // namespace

Tensor recurrence_backward(const char* op, RecurrenceBackward run, const Tensor& u,
                           std::initializer_list<Weights> weights, std::initializer_list<State> states,
                           const std::optional<Tensor>& cu_seqlens, bool needs_u, bool needs_weights,
                           bool needs_start) {
  InFloatMode mode(Subnormals::as_asked);
  ScalarType dtype = u.scalar_type(), accumulator = accumulator_of(dtype);
  int64_t B = u.size(0), T = u.size(1), H = u.size(3), element = int64_t(u.element_size());
  std::vector<Tensor> kept;  // what the pointers point to
  auto keep = [&](const Tensor& tensor) -> const Tensor& { return kept.emplace_back(tensor); };
  Tensor bounds;
  RecurrenceBackwardArgs args{};
  args.sequences = sequences_of(op, cu_seqlens, B, T, bounds);
  args.u = series_of(keep(with_unit_channels(u)));
  args.H = H;
  args.dtype = dtype_of(u);
  int64_t S = args.sequences.count, groups = std::min(S, kGroups), rows = 0;

  std::vector<char> zeros(H * element);
  Series nothing{zeros.data(), 0, 0, 0, 0};
  int i = 0;
  for (const State& state : states) {
    args.states[i] = series_of(keep(with_unit_channels(state.states)));
    args.start[i] = state.start ? states_of(keep(with_unit_channels(*state.start))) : nothing;
    args.d_states[i] = state.d_states ? series_of(keep(with_unit_channels(*state.d_states))) : nothing;
    state.d_start = needs_start ? allocate({S, H}, dtype) : allocate({0}, dtype);
    args.d_start[i++] = needs_start ? state.d_start.mutable_data_ptr() : nullptr;
  }
  for (const Weights& part : weights) {
    auto* data = static_cast<const char*>(keep(as_contiguous(part.values, dtype)).const_data_ptr());
    for (int64_t row = 0; row < part.values.size(0); ++row) args.weights[rows++] = data + row * H * element;
  }
  Tensor d_u = needs_u ? allocate({B, T, 3, H}, dtype) : allocate({0}, dtype);
  prefer_huge_pages(d_u.mutable_data_ptr(), size_t(d_u.numel() * element));
  args.d_u = needs_u ? d_u.mutable_data_ptr() : nullptr;
  Tensor sums = needs_weights ? allocate({groups, rows, H}, accumulator) : allocate({0}, accumulator);
  args.d_weights = needs_weights ? sums.mutable_data_ptr() : nullptr;

  if (S > 0 && H > 0) {
    int64_t bytes = 20 * element * B * T / groups;
    parallel_channels(groups, H, bytes, {128, 4}, [&](int64_t group, Range channels) {
      run(args, group, {group * S / groups, (group + 1) * S / groups}, channels);
    });
  }
  int64_t first = 0;
  for (const Weights& part : weights) {
    int64_t count = part.values.size(0);
    if (!needs_weights) part.gradient = allocate({0}, dtype);
    else if (accumulator == ScalarType::Double)
      part.gradient = sum_of_groups(sums.const_data_ptr<double>() + first, groups, rows * H, count, H, dtype);
    else part.gradient = sum_of_groups(sums.const_data_ptr<float>() + first, groups, rows * H, count, H, dtype);
    first += count * H;
  }
  return d_u;
}

}  // namespace fastsparse::edge
