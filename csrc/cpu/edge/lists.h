// Sums of listed rows: what spmm does with a ragged code, and spmm_t with one in latent-major order.
#pragma once

#include "cpu/edge/edge.h"

namespace fastsparse::edge {

// (count, D): out[i] sums coefficients[e] * matrix[rows[e]] over offsets[i] <= e < offsets[i + 1], in this order, so
// many columns at a time. Coefficients are of the accumulation type, rows in range, matrix of unit stride.
Tensor sum_lists(const Tensor& coefficients, const Tensor& rows, const int64_t* offsets, int64_t count,
                 const Tensor& matrix, int64_t panel);

}  // namespace fastsparse::edge
