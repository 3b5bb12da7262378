#include "cpu/polynomials.h"

#include <tuple>

#include "cpu/edge/edge.h"

#define FASTSPARSE_POLYNOMIAL_OP(op) FASTSPARSE_REGISTER(fastsparse, CPU, op)

namespace fastsparse::edge {

#include "polynomial_ops.h"

Tensor polynomial(PolynomialKind kind, const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  InFloatMode mode(Subnormals::as_asked);
  const ScalarType dtype = x.scalar_type();
  const int64_t N = x.size(0), D = x.size(1), bytes = D * int64_t(x.element_size());
  Tensor rows = with_unit_stride(x), weights = as_contiguous(weight, dtype), constant = as_contiguous(bias, dtype);
  Tensor y = allocate({N, D}, dtype);
  prefer_huge_pages(y.mutable_data_ptr(), size_t(N * bytes));
  PolynomialArgs args{};
  args.kind = kind, args.eps = eps, args.dtype = dtype_of(x);
  args.x = rows.const_data_ptr(), args.x_stride = rows.stride(0);
  args.weight = weights.const_data_ptr(), args.bias = constant.const_data_ptr();
  args.out = y.mutable_data_ptr();
  args.N = N, args.D = D;
  if (D > 0) parallel(N, rows_a_task(2 * bytes), FASTSPARSE_KERNEL(polynomial), args);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> polynomial_backward(PolynomialKind kind, const Tensor& x, const Tensor& weight,
                                                       double eps, const Tensor& d_y, bool needs_x,
                                                       bool needs_parameters) {
  InFloatMode mode(Subnormals::as_asked);
  const ScalarType dtype = x.scalar_type();
  const int64_t N = x.size(0), D = x.size(1), bytes = D * int64_t(x.element_size());
  const int64_t blocks = (N + kPolynomialRows - 1) / kPolynomialRows;
  Tensor rows = with_unit_stride(x), weights = as_contiguous(weight, dtype), upstream = with_unit_stride(d_y);
  Tensor d_x = needs_x ? allocate({N, D}, dtype) : allocate({0}, dtype);
  prefer_huge_pages(d_x.mutable_data_ptr(), size_t(d_x.numel()) * d_x.element_size());
  Scratch sums;
  PolynomialArgs args{};
  args.kind = kind, args.eps = eps, args.dtype = dtype_of(x);
  args.x = rows.const_data_ptr(), args.x_stride = rows.stride(0);
  args.d_y = upstream.const_data_ptr(), args.d_y_stride = upstream.stride(0);
  args.weight = weights.const_data_ptr();
  if (needs_x) args.out = d_x.mutable_data_ptr();
  if (needs_parameters) args.sums = sums.get<double>(blocks * (kPowers + 1));
  args.N = N, args.D = D;
  if (needs_x || needs_parameters)
    parallel(blocks, rows_a_task(3 * bytes * kPolynomialRows), FASTSPARSE_KERNEL(polynomial_backward), args);
  if (!needs_parameters) return {d_x, allocate({0}, dtype), allocate({0}, dtype)};

  double total[kPowers + 1] = {};
  for (int64_t i = 0; i < blocks * (kPowers + 1); ++i) total[i % (kPowers + 1)] += args.sums[i];
  auto rounded = [&](const double* from, int64_t count) {
    Tensor exact = allocate({count}, ScalarType::Double);
    std::copy(from, from + count, static_cast<double*>(exact.mutable_data_ptr()));
    return as_contiguous(exact, dtype);
  };
  return {d_x, rounded(total, kPowers), rounded(total + kPowers, 1)};
}

}  // namespace fastsparse::edge
