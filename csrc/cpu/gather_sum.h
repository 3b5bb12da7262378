// The loop that spmm and spmm_t share: a weighted sum of gathered rows.
#pragma once

#include "cpu/simd.h"

namespace fastsparse::FASTSPARSE_ISA {

// How many rows ahead a block is prefetched: the addresses are random, so the hardware can't.
inline constexpr int64_t kAhead = 3;

// `Registers` vectors of columns stay in registers over all terms, so each output is written once.
template <int Registers, typename T, typename Out>
inline void gather_block(const Accumulator<T>* coefficients, const int64_t* rows, int64_t count, const T* matrix,
                         int64_t row_stride, Out* out) {
  using C = Accumulator<T>;
  constexpr int lanes = kLanes<C>;
  constexpr int64_t line = 64 / sizeof(T);
  Vector<C> total[Registers] = {};
  for (int64_t i = 0; i < count; ++i) {
    const T* row = matrix + rows[i] * row_stride;
    if (i + kAhead < count) {
      const T* next = matrix + rows[i + kAhead] * row_stride;
      for (int64_t offset = 0; offset < Registers * lanes; offset += line) prefetch(next + offset);
    }
    Vector<C> coefficient = broadcast(coefficients[i]);
#pragma GCC unroll 16
    for (int r = 0; r < Registers; ++r) total[r] += coefficient * load(row + r * lanes);
  }
#pragma GCC unroll 16
  for (int r = 0; r < Registers; ++r) store(total[r], out + r * lanes);
}

// out[0:D] = sum_i coefficients[i] * matrix[rows[i]][0:D], the terms added in order.
template <typename T, typename Out>
inline void gather_sum(const Accumulator<T>* coefficients, const int64_t* rows, int64_t count, const T* matrix,
                       int64_t row_stride, int64_t D, Out* out) {
  using C = Accumulator<T>;
  constexpr int lanes = kLanes<C>;
  int64_t d = 0;
  auto blocks = [&]<int Registers>() {
    for (; d + Registers * lanes <= D; d += Registers * lanes)
      gather_block<Registers>(coefficients, rows, count, matrix + d, row_stride, out + d);
  };
  // Wider blocks than these measured slower where the matrix lies on 4 kB pages, as PyTorch's own do.
  blocks.template operator()<kVectorBytes == 64 ? 16 : 8>();
  blocks.template operator()<4>();
  blocks.template operator()<1>();
  for (; d < D; ++d) {
    C total = 0;
    for (int64_t i = 0; i < count; ++i) total += coefficients[i] * to_float(matrix[rows[i] * row_stride + d]);
    from_float(total, out[d]);
  }
}

}  // namespace fastsparse::FASTSPARSE_ISA
