#include "cpu/linear_recurrence_backward.h"

#include <tuple>

#include "cpu/edge/sequences.h"
#include "cpu/linear_recurrence.h"

namespace fastsparse::edge {

std::tuple<Tensor, Tensor, Tensor> linear_recurrence_backward(const Tensor& a, const std::optional<Tensor>& h0,
                                                              bool reverse, const std::optional<Tensor>& cu_seqlens,
                                                              const Tensor& h, const Tensor& d_h, bool needs_a,
                                                              bool needs_b, bool needs_h0) {
  InFloatMode mode(Subnormals::as_asked);
  const bool pairs = h.dim() == 4;
  const ScalarType dtype = h.scalar_type();
  const int64_t B = h.size(0), T = h.size(1), H = h.size(h.dim() - 1), element = int64_t(h.element_size());
  Tensor bounds, factors = with_unit_channels(a), states = with_unit_channels(h), upstream = with_unit_channels(d_h);
  Tensor start;
  LinearRecurrenceBackwardArgs args{};
  args.sequences = sequences_of("linear_recurrence_backward", cu_seqlens, B, T, bounds);
  args.a = series_of(factors), args.h = series_of(states), args.d_h = series_of(upstream);
  args.pairs = pairs, args.reverse = reverse, args.dtype = dtype_of(h);
  const int64_t S = args.sequences.count;
  if (h0) {
    start = with_unit_channels(*h0);
    args.h0 = states_of(start);
  }
  auto along = [&](bool needed, std::initializer_list<int64_t> sizes, Series& series) {
    Tensor output = needed ? allocate(sizes, dtype) : allocate({0}, dtype);
    prefer_huge_pages(output.mutable_data_ptr(), size_t(output.numel() * element));
    if (needed) series = series_of(output);
    return output;
  };
  Tensor d_a = pairs ? along(needs_a, {B, T, 2, 2, H}, args.d_a) : along(needs_a, {B, T, H}, args.d_a);
  Tensor d_b = pairs ? along(needs_b, {B, T, 2, H}, args.d_b) : along(needs_b, {B, T, H}, args.d_b);
  Tensor d_h0 = !needs_h0 ? allocate({0}, dtype) : pairs ? allocate({S, 2, H}, dtype) : allocate({S, H}, dtype);
  if (needs_h0) args.d_h0 = states_of(d_h0);
  if (needs_a || needs_b || needs_h0)
    parallel_channels(S, H, T * element * (pairs ? 14 : 5), {kLinearChannels, 1},
                      FASTSPARSE_KERNEL(linear_recurrence_backward), args);
  return {d_a, d_b, d_h0};
}

FASTSPARSE_REGISTER(fastsparse, CPU, linear_recurrence_backward)

}  // namespace fastsparse::edge
