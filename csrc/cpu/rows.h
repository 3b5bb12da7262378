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
  void* rows = nullptr;       // bf16, or panels of bf16 (bf16_panels.h) or integers (integers.h)
  int64_t stride = 0;         // between rows of bf16
  float* norm = nullptr;      // (count) |rounded row|
  float* residual = nullptr;  // (count) |row - rounded row|
  float* scale = nullptr;     // (count) of integers: what they are multiples of
};

// To (count, D) of the accumulation type.
FASTSPARSE_DECLARE_KERNEL(void rows_widen(const Rows& rows, void* widened, int64_t begin, int64_t end))
// To bf16, in panels of so many rows if `height` isn't 1; rows of bf16 may be what they are rounded to, and are only measured
// then.
FASTSPARSE_DECLARE_KERNEL(void rows_round(const Rows& rows, int64_t height, const Rounded& to, int64_t begin,
                                          int64_t end))
// Scores (N, count) of few rows x, in the accumulation type and order, with rows [begin, end) of the weight where they lie.
// `end` - `begin` is best a multiple of kScoredTogether.
inline constexpr int64_t kScoredTogether = 6;
FASTSPARSE_DECLARE_KERNEL(void rows_score(const Rows& x, int64_t N, const Rows& weight, int64_t count, void* scores,
                                          int64_t begin, int64_t end))
// Of bf16 rows, in any order of the weight's: the scores rounded to bf16, from products whose subnormal operands and
// results may be taken for zeros, and the norms of these rows of the weight as rows_round has them.
FASTSPARSE_DECLARE_KERNEL(void rows_score_bf16(const Rows& x, int64_t N, const Rows& weight, const Rounded& norms,
                                               int64_t count, bf16* scores, int64_t begin, int64_t end))
inline constexpr int64_t kNarrowTogether = 4;

}  // namespace fastsparse
