#include "cpu/matching_pursuit_backward.h"

#include <algorithm>
#include <atomic>

#include "cpu/edge/edge.h"

namespace fastsparse::edge {

namespace {

constexpr int64_t kPanelBytes = int64_t{4} << 20;  // of a panel's sums: with the atoms' columns, a cache's share

// The dictionary's gradient, panel after panel of its columns.
void dictionary_backward(const PursuitBackwardArgs& args, int64_t accumulator_bytes) {
  if (args.D == 0) return;
  int64_t threads = torch::stable::get_num_threads();
  int64_t vector_bytes = FASTSPARSE_KERNEL(matching_pursuit_backward_vector_bytes)();
  int64_t lanes = vector_bytes / accumulator_bytes;
  // Wide panels read the steps less often, where they fit and all threads get some.
  int64_t vectors = args.M * 4 * vector_bytes <= kPanelBytes && args.D >= 8 * lanes * threads ? 4 : 1;
  int64_t panels = (args.D + vectors * lanes - 1) / (vectors * lanes);
  std::atomic<int64_t> next{0};
  auto run = FASTSPARSE_KERNEL(matching_pursuit_backward_columns);
  parallel(std::min(threads, panels), 1, [&](int64_t, int64_t) {
    Scratch sums;
    for (int64_t panel; (panel = next.fetch_add(1, std::memory_order_relaxed)) < panels;)
      run(args, panel * vectors * lanes, vectors, sums.get<char>(args.M * vectors * vector_bytes));
  });
}

}  // namespace

std::tuple<Tensor, Tensor> matching_pursuit_backward(const Tensor& values, const Tensor& indices,
                                                     const Tensor& residual, const Tensor& dictionary,
                                                     const Tensor& d_values, const std::optional<Tensor>& d_residual,
                                                     bool normalized, bool needs_x, bool needs_dictionary) {
  InFloatMode mode(Subnormals::as_asked);
  int64_t N = indices.size(0), k = indices.size(1), M = dictionary.size(0), D = dictionary.size(1);
  ScalarType dtype = residual.scalar_type(), accumulator = accumulator_of(dtype);
  int64_t accumulator_bytes = accumulator == ScalarType::Double ? 8 : 4;
  Tensor codes = as_contiguous(indices, ScalarType::Long), rows = with_unit_stride(residual),
         atoms = with_unit_stride(dictionary), coefficients = as_contiguous(values, accumulator),
         d_coefficients = as_contiguous(d_values, accumulator);
  check_indices("matching_pursuit_backward", codes, M);
  std::optional<Tensor> d_rows;
  if (d_residual) d_rows = with_unit_stride(*d_residual);
  Tensor g = allocate({N, D}, accumulator);
  Tensor d_dictionary = needs_dictionary ? allocate({M, D}, dtype) : allocate({0}, dtype);
  prefer_huge_pages(d_dictionary.mutable_data_ptr(), size_t(d_dictionary.numel()) * d_dictionary.element_size());
  Scratch steps;

  PursuitBackwardArgs args{codes.const_data_ptr<int64_t>(),
                           coefficients.const_data_ptr(),
                           d_coefficients.const_data_ptr(),
                           rows.const_data_ptr(),
                           d_rows ? d_rows->const_data_ptr() : nullptr,
                           atoms.const_data_ptr(),
                           steps.get<char>(N * k * (8 + 2 * accumulator_bytes)),
                           g.mutable_data_ptr(),
                           d_dictionary.mutable_data_ptr(),
                           N,
                           D,
                           M,
                           k,
                           rows.stride(0),
                           d_rows ? d_rows->stride(0) : 0,
                           atoms.stride(0),
                           normalized,
                           dtype_of(residual)};
  parallel(N, rows_a_task(k * D * accumulator_bytes), FASTSPARSE_KERNEL(matching_pursuit_backward_rows), args);
  if (needs_dictionary) dictionary_backward(args, accumulator_bytes);
  return {needs_x ? as_contiguous(g, dtype) : allocate({0}, dtype), d_dictionary};
}

FASTSPARSE_REGISTER(fastsparse, CPU, matching_pursuit_backward)

}  // namespace fastsparse::edge
