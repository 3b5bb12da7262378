// The loop that spmm and spmm_t share: a weighted sum of gathered rows.
#pragma once

#include "cpu/simd.h"

namespace fastsparse::FASTSPARSE_ISA {

// out[0:D] = sum_i coefficients[i] * matrix[rows[i]][0:D], the terms added in order.
//
// A block of columns stays in registers over all terms, so each output is written once. The next rows are
// prefetched: their addresses are random, so the hardware can't.
template <typename T, typename Out>
inline void gather_sum(const Accumulator<T>* coefficients, const int64_t* rows, int64_t count, const T* matrix,
                       int64_t row_stride, int64_t D, Out* out) {
  using C = Accumulator<T>;
  constexpr int lanes = kLanes<C>;
  constexpr int registers = kVectorBytes == 64 ? 16 : 8;
  constexpr int64_t block = registers * lanes;
  constexpr int64_t ahead = 3, line = 64 / sizeof(T);
  int64_t d = 0;
  for (; d + block <= D; d += block) {
    Vector<C> total[registers] = {};
    for (int64_t i = 0; i < count; ++i) {
      const T* row = matrix + rows[i] * row_stride + d;
      if (i + ahead < count) {
        const T* next = matrix + rows[i + ahead] * row_stride + d;
        for (int64_t offset = 0; offset < block; offset += line) prefetch(next + offset);
      }
      Vector<C> coefficient = broadcast(coefficients[i]);
#pragma GCC unroll 16
      for (int r = 0; r < registers; ++r) total[r] += coefficient * load(row + r * lanes);
    }
#pragma GCC unroll 16
    for (int r = 0; r < registers; ++r) store(total[r], out + d + r * lanes);
  }
  for (; d + lanes <= D; d += lanes) {
    Vector<C> total = {};
    for (int64_t i = 0; i < count; ++i)
      total += broadcast(coefficients[i]) * load(matrix + rows[i] * row_stride + d);
    store(total, out + d);
  }
  for (; d < D; ++d) {
    C total = 0;
    for (int64_t i = 0; i < count; ++i) total += coefficients[i] * to_float(matrix[rows[i] * row_stride + d]);
    from_float(total, out[d]);
  }
}

}  // namespace fastsparse::FASTSPARSE_ISA
