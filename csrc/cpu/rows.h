// Rows of a matrix where they lie, and what goes into a product in their place.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "cpu/isa.h"

namespace fastsparse {

struct Rows {
  const void* data;      // rows `stride` apart, of `dtype`
  const int64_t* order;  // which of them; null for 0, 1, 2, ...
  int64_t stride, D;
  DType dtype;
};

template <typename T> const T* row_of(const Rows& rows, int64_t i) {
  return static_cast<const T*>(rows.data) + (rows.order ? rows.order[i] : i) * rows.stride;
}

// Rows in fewer bits, with the norms that the bracket of a screen needs.
struct Rounded {
  void* rows = nullptr;       // (count, D) bf16, or panels of bf16 (bf16_panels.h) or integers (integers.h)
  float* norm = nullptr;      // (count) |rounded row|
  float* residual = nullptr;  // (count) |row - rounded row|
  float* scale = nullptr;     // (count) of integers: what they are multiples of
};

// To (count, D) of the accumulation type.
FASTSPARSE_DECLARE_KERNEL(void rows_widen(const Rows& rows, void* widened, int64_t begin, int64_t end))
// To (count, D) bf16, if `height` is 1, or else to panels of so many rows.
FASTSPARSE_DECLARE_KERNEL(void rows_round(const Rows& rows, int64_t height, const Rounded& to, int64_t begin,
                                          int64_t end))
// Scores (N, count) of few rows x straight from storage types that the product has no fp32 result for; of the weight's
// rows [begin, end).
FASTSPARSE_DECLARE_KERNEL(void rows_score(const Rows& x, int64_t N, const Rows& weight, int64_t count, float* scores,
                                          int64_t begin, int64_t end))

}  // namespace fastsparse
