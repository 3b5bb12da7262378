#include "cpu/linear_recurrence.h"

#include "cpu/edge/sequences.h"

namespace fastsparse::edge {

Tensor linear_recurrence(const Tensor& a, const Tensor& b, const std::optional<Tensor>& h0, bool reverse,
                         const std::optional<Tensor>& cu_seqlens) {
  InFloatMode mode(Subnormals::as_asked);
  bool pairs = b.dim() == 4;
  int64_t B = b.size(0), T = b.size(1), H = b.size(b.dim() - 1);
  Tensor bounds, factors = with_unit_channels(a), terms = with_unit_channels(b), start;
  Tensor h = pairs ? allocate({B, T, 2, H}, b.scalar_type()) : allocate({B, T, H}, b.scalar_type());
  prefer_huge_pages(h.mutable_data_ptr(), size_t(h.numel()) * h.element_size());
  LinearRecurrenceArgs args{sequences_of("linear_recurrence", cu_seqlens, B, T, bounds),
                            series_of(factors),
                            series_of(terms),
                            {},
                            series_of(h),
                            pairs,
                            reverse,
                            dtype_of(b)};
  if (h0) {
    start = with_unit_channels(*h0);
    args.h0 = states_of(start);
  }
  if (h.numel() == 0) return h;
  parallel_channels(args.sequences.count, H, T * int64_t(b.element_size()) * (pairs ? 8 : 3), {kLinearChannels, 1},
                    FASTSPARSE_KERNEL(linear_recurrence), args);
  return h;
}

FASTSPARSE_REGISTER(fastsparse, CPU, linear_recurrence)

}  // namespace fastsparse::edge
