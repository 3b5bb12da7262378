// Polynomial activations of rows, and their gradients.
//
// A row goes through twice, the second time out of the cache: once for its sums, once for what is made of them. So
// memory is read once, x of the forward pass, x and d_y of the backward pass, which makes the moments of x again, and
// written once: 8 bytes an element forward and 12 backward in fp32. The weights' gradients are summed up over blocks of
// kPolynomialRows rows, whoever has them, and these one after the other.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "powers.h"
#include "cpu/isa.h"

namespace fastsparse {

inline constexpr int64_t kPolynomialRows = 16;

struct PolynomialArgs {
  PolynomialKind kind;
  const void *x, *d_y;            // (N) rows x_stride and d_y_stride apart
  const void *weight, *bias;      // (3), (1), contiguous
  void* out;                      // (N, D): y, or d_x, or null
  double* sums;                   // (blocks, 4): what comes to weights and bias, or null
  int64_t N, D, x_stride, d_y_stride;
  double eps;
  DType dtype;
};

FASTSPARSE_DECLARE_KERNEL(void polynomial(const PolynomialArgs& args, int64_t row_begin, int64_t row_end))
FASTSPARSE_DECLARE_KERNEL(void polynomial_backward(const PolynomialArgs& args, int64_t block_begin, int64_t block_end))

}  // namespace fastsparse
