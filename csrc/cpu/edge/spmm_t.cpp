#include <algorithm>
#include <vector>

#include "cpu/edge/lists.h"

namespace fastsparse::edge {

namespace {

// A code by tokens: rows of k entries, or those between offsets.
struct TokenMajor {
  const int64_t *indices, *offsets;
  int64_t N, k;

  int64_t entries() const { return end(N - 1); }
  int64_t end(int64_t n) const { return offsets ? offsets[n + 1] : (n + 1) * k; }

  // Calls f(n, e) for every entry, in order.
  template <typename F> void each(const F& f) const {
    for (int64_t n = 0, e = 0; n < N; ++n)
      for (int64_t last = end(n); e < last; ++e) f(n, e);
  }
};

// The same by latents: a stable counting sort, so a latent's entries keep the order of (n, j).
struct LatentMajor {
  std::vector<int64_t> offsets;  // (M + 1), and one more
  Tensor rows, values;           // (nnz)
};

template <typename C> LatentMajor latent_major(const TokenMajor& code, const Tensor& values, int64_t M) {
  int64_t nnz = code.entries();
  auto* value = static_cast<const C*>(values.const_data_ptr());
  LatentMajor sorted{std::vector<int64_t>(M + 2), allocate({nnz}, ScalarType::Long),
                     allocate({nnz}, values.scalar_type())};
  // Counts are kept two places on, so that filling, which moves each latent's begin to its end, leaves the offsets.
  for (int64_t e = 0; e < nnz; ++e) ++sorted.offsets[code.indices[e] + 2];
  for (int64_t m = 0; m < M; ++m) sorted.offsets[m + 1] += sorted.offsets[m];
  int64_t* row_out = sorted.rows.mutable_data_ptr<int64_t>();
  C* value_out = static_cast<C*>(sorted.values.mutable_data_ptr());
  code.each([&](int64_t n, int64_t e) {
    int64_t place = sorted.offsets[code.indices[e] + 1]++;
    row_out[place] = n;
    value_out[place] = value[e];
  });
  return sorted;
}

// Of one column, such as a bias has, each entry is one addition, which costs less than sorting it.
template <typename C> Tensor sum_column(const TokenMajor& code, const Tensor& values, const Tensor& x, int64_t M) {
  Tensor column = as_contiguous(x, values.scalar_type()), out = allocate({M, 1}, values.scalar_type());
  auto* value = static_cast<const C*>(values.const_data_ptr());
  auto* factor = static_cast<const C*>(column.const_data_ptr());
  C* total = static_cast<C*>(out.mutable_data_ptr());
  std::fill_n(total, M, C(0));
  code.each([&](int64_t n, int64_t e) { total[code.indices[e]] += value[e] * factor[n]; });
  return as_contiguous(out, x.scalar_type());
}

template <typename C> Tensor multiply(const TokenMajor& code, const Tensor& values, const Tensor& x, int64_t M) {
  if (x.size(1) == 1) return sum_column<C>(code, values, x, M);
  LatentMajor sorted = latent_major<C>(code, values, M);
  return sum_lists(sorted.values, sorted.rows, sorted.offsets.data(), M, with_unit_stride(x), x.size(1));
}

}  // namespace

Tensor spmm_t(const Tensor& values, const Tensor& indices, const Tensor& x, int64_t M,
              const std::optional<Tensor>& offsets) {
  InFloatMode mode(Subnormals::as_asked);
  ScalarType accumulator = accumulator_of(x.scalar_type());
  Tensor codes = as_contiguous(indices, ScalarType::Long), coefficients = as_contiguous(values, accumulator), bounds;
  check_indices("spmm_t", codes, M);
  TokenMajor code{codes.const_data_ptr<int64_t>(), nullptr, x.size(0), 0};
  if (offsets) {
    bounds = torch::stable::contiguous(*offsets);
    check_offsets("spmm_t", bounds, codes);
    code.offsets = bounds.const_data_ptr<int64_t>();
  } else code.k = codes.size(1);
  return accumulator == ScalarType::Double ? multiply<double>(code, coefficients, x, M)
                                           : multiply<float>(code, coefficients, x, M);
}

FASTSPARSE_REGISTER(fastsparse, CPU, spmm_t)

}  // namespace fastsparse::edge
