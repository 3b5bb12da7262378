#include "cpu/spmm_t.h"

#include <vector>

#include "cpu/edge/edge.h"

namespace fastsparse::edge {

namespace {

// The code in latent-major order: a stable counting sort, so a latent's entries keep the order of (n, j).
struct LatentMajor {
  std::vector<int64_t> offsets;  // (M + 1)
  Tensor rows, values;           // (nnz)
};

template <typename C>
LatentMajor latent_major(const Tensor& values, const Tensor& indices, int64_t M) {
  int64_t nnz = indices.numel(), k = indices.size(1);
  const int64_t* index = indices.const_data_ptr<int64_t>();
  const C* value = static_cast<const C*>(values.const_data_ptr());
  LatentMajor sorted{std::vector<int64_t>(M + 2), allocate({nnz}, ScalarType::Long),
                     allocate({nnz}, values.scalar_type())};
  // Counts are kept two places on, so that filling, which moves each latent's begin to its end, leaves the offsets.
  for (int64_t i = 0; i < nnz; ++i)
    ++sorted.offsets[index[i] + 2];
  for (int64_t m = 0; m < M; ++m) sorted.offsets[m + 1] += sorted.offsets[m];
  int64_t* row_out = sorted.rows.mutable_data_ptr<int64_t>();
  C* value_out = static_cast<C*>(sorted.values.mutable_data_ptr());
  for (int64_t n = 0, i = 0; i < nnz; ++n)
    for (int64_t j = 0; j < k; ++j, ++i) {
      int64_t place = sorted.offsets[index[i] + 1]++;
      row_out[place] = n;
      value_out[place] = value[i];
    }
  return sorted;
}

}  // namespace

Tensor spmm_t(const Tensor& values, const Tensor& indices, const Tensor& x, int64_t M) {
  InFloatMode mode(Subnormals::as_asked);
  int64_t D = x.size(1);
  ScalarType accumulator = accumulator_of(x.scalar_type());
  Tensor codes = as_contiguous(indices, ScalarType::Long), rows = with_unit_stride(x);
  check_indices("spmm_t", codes, M);
  Tensor coefficients = as_contiguous(values, accumulator);
  LatentMajor sorted = accumulator == ScalarType::Double ? latent_major<double>(coefficients, codes, M)
                                                         : latent_major<float>(coefficients, codes, M);
  Tensor out = allocate({M, D}, x.scalar_type());
  prefer_huge_pages(out.mutable_data_ptr(), size_t(out.numel()) * out.element_size());
  SpmmTArgs args{sorted.values.const_data_ptr(), sorted.rows.const_data_ptr<int64_t>(), sorted.offsets.data(),
                 rows.const_data_ptr(), out.mutable_data_ptr(), D, rows.stride(0), dtype_of(x),
                 x.numel() * int64_t(x.element_size()) <= kCache};
  parallel(M, 64, FASTSPARSE_KERNEL(spmm_t), args);

  std::vector<Range> segments;
  std::vector<Hot> hot;
  for (int64_t m = 0; m < M; ++m) {
    int64_t begin = sorted.offsets[m], end = sorted.offsets[m + 1];
    if (end - begin <= kSegment) continue;
    hot.push_back({m, int64_t(segments.size()), 0});
    for (; begin < end; begin += kSegment) segments.push_back({begin, begin + kSegment < end ? begin + kSegment : end});
    hot.back().end = int64_t(segments.size());
  }
  if (hot.empty()) return out;
  Tensor sums = allocate({int64_t(segments.size()), D}, accumulator);
  void* partials = sums.mutable_data_ptr();
  parallel(int64_t(segments.size()), 1, FASTSPARSE_KERNEL(spmm_t_segments), args, segments.data(), partials);
  parallel(int64_t(hot.size()), 1, FASTSPARSE_KERNEL(spmm_t_join), args, hot.data(), partials);
  return out;
}

FASTSPARSE_REGISTER(fastsparse, CPU, spmm_t)

}  // namespace fastsparse::edge
