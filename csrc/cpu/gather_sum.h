// The loop that spmm and spmm_t share: a weighted sum of gathered rows.
#pragma once

#include "cpu/simd.h"

namespace fastsparse::FASTSPARSE_ISA {

// sum_i coefficients[i] * matrix[rows[i]]. After rows[count] come `later` more, which the caller will gather next.
template <typename T> struct Gather {
  const Accumulator<T>* coefficients;
  const int64_t* rows;
  int64_t count, later;
  const T* matrix;
  int64_t row_stride;

  const T* row(int64_t i) const { return matrix + rows[i] * row_stride; }
};

// How many rows ahead a block is prefetched: the addresses are random, so the hardware can't.
inline constexpr int64_t kAhead = 6;

// `Registers` vectors of columns from d on; they stay in registers over all terms, so each output is written once. What
// is prefetched runs on past the last term: into these rows' next columns, or into the first columns of later rows.
template <int Registers, typename T, typename Out>
inline void gather_block(const Gather<T>& sum, int64_t d, bool last, Out* out) {
  using C = Accumulator<T>;
  constexpr int64_t lanes = kLanes<C>, width = Registers * lanes, line = 64 / sizeof(T);
  int64_t next_row = last ? 0 : -sum.count, next_column = last ? 0 : d + width;
  int64_t end = last ? sum.count + sum.later : sum.count;
  Vector<C> total[Registers] = {};
  for (int64_t i = 0; i < sum.count; ++i) {
    bool here = i + kAhead < sum.count;
    if (int64_t ahead = i + kAhead + (here ? 0 : next_row); ahead < end) {
      const T* next = sum.row(ahead) + (here ? d : next_column);
      for (int64_t offset = 0; offset < width; offset += line) prefetch(next + offset);
    }
    const T* row = sum.row(i) + d;
    Vector<C> coefficient = broadcast(sum.coefficients[i]);
#pragma GCC unroll 16
    for (int r = 0; r < Registers; ++r) total[r] += coefficient * load(row + r * lanes);
  }
#pragma GCC unroll 16
  for (int r = 0; r < Registers; ++r) store(total[r], out + d + r * lanes);
}

// out[0:D] = the sum, its terms added in order.
template <typename T, typename Out> inline void gather_sum(const Gather<T>& sum, int64_t D, Out* out) {
  using C = Accumulator<T>;
  int64_t d = 0;
  auto blocks = [&]<int Registers>() {
    for (int64_t width = Registers * kLanes<C>; d + width <= D; d += width)
      gather_block<Registers>(sum, d, d + 2 * width > D, out);
  };
  blocks.template operator()<8>();
  blocks.template operator()<2>();
  blocks.template operator()<1>();
  for (; d < D; ++d) {
    C total = 0;
    for (int64_t i = 0; i < sum.count; ++i) total += sum.coefficients[i] * to_float(sum.row(i)[d]);
    from_float(total, out[d]);
  }
}

}  // namespace fastsparse::FASTSPARSE_ISA
