#include "cpu/edge/lists.h"

#include <algorithm>
#include <vector>

#include "cpu/lists.h"

namespace fastsparse::edge {

Tensor sum_lists(const Tensor& coefficients, const Tensor& rows, const int64_t* offsets, int64_t count,
                 const Tensor& matrix, int64_t panel) {
  int64_t D = matrix.size(1), size = int64_t(matrix.element_size()), entries = offsets[count];
  Tensor out = allocate({count, D}, matrix.scalar_type()), sums;
  prefer_huge_pages(out.mutable_data_ptr(), size_t(out.numel() * size));
  ListsArgs args{coefficients.const_data_ptr(), rows.const_data_ptr<int64_t>(), offsets, matrix.const_data_ptr(),
                 out.mutable_data_ptr(), count, D, matrix.stride(0), dtype_of(matrix),
                 fetch_of(std::min(entries, matrix.size(0)) * D * size <= kCache, D * size)};

  std::vector<Range> segments;
  std::vector<Hot> hot;
  for (int64_t i = 0; i < count; ++i) {
    int64_t begin = offsets[i], end = offsets[i + 1];
    if (end - begin <= kSegment) continue;
    hot.push_back({i, int64_t(segments.size()), 0});
    for (; begin < end; begin += kSegment) segments.push_back({begin, std::min(begin + kSegment, end)});
    hot.back().end = int64_t(segments.size());
  }
  void* partials = nullptr;
  if (!hot.empty()) {
    sums = allocate({int64_t(segments.size()), D}, coefficients.scalar_type());
    partials = sums.mutable_data_ptr();
  }

  for (int64_t d = 0; d < D; d += panel) {
    Range columns{d, std::min(d + panel, D)};
    parallel(count + entries, entries_a_task(panel * size), FASTSPARSE_KERNEL(sum_lists), args, columns);
    parallel(int64_t(segments.size()), 1, FASTSPARSE_KERNEL(sum_segments), args, columns, segments.data(), partials);
  }
  parallel(int64_t(hot.size()), 1, FASTSPARSE_KERNEL(join_segments), args, hot.data(), partials);
  return out;
}

}  // namespace fastsparse::edge
