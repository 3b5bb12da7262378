// The loop that spmm and spmm_t share: a weighted sum of gathered rows.
#pragma once

#include <algorithm>

#include "cpu/simd.h"

namespace fastsparse::FASTSPARSE_ISA {

// sum_i coefficients[i] * matrix[rows[i]]. After rows[count] come `later` more, which the caller will gather next.
template <typename T> struct Gather {
  const Accumulator<T>* coefficients;
  const int64_t* rows;
  int64_t count, later;
  const T* matrix;
  int64_t row_stride;
  bool cached;  // whether the rows are likely to be in the cache already, of whatever level

  const T* row(int64_t i) const { return matrix + rows[i] * row_stride; }
};

// How many rows ahead a block of columns is prefetched: the addresses are random, so the hardware can't. From memory into
// the second level of the cache, which waits for more lines at once than the first; from the cache into the first, where
// a short way ahead is enough. (Zen 4: at N=1024 D=768 M=16384 k=32 the second level and 12 KB took a fifth less time than
// any number into the first; at N=4096 D=384 M=6144 k=16, which is in the cache, a tenth more than 3 KB into the first.)
template <bool Cached, typename T> constexpr int64_t rows_ahead(int64_t columns) {
  return std::min<int64_t>(24, (int64_t{Cached ? 3 : 12} << 10) / (columns * int64_t(sizeof(T))));
}

// `Registers` vectors of columns from d on; they stay in registers over all terms, so each output is written once. What
// is prefetched runs on past the last term: into these rows' next columns, or into the first columns of later rows.
template <bool Cached, int Registers, typename T, typename Out>
inline void gather_block(const Gather<T>& sum, int64_t d, bool last, Out* out) {
  using C = Accumulator<T>;
  constexpr int64_t lanes = kLanes<C>, width = Registers * lanes, line = 64 / sizeof(T);
  constexpr int64_t rows = rows_ahead<Cached, T>(width);
  int64_t next_row = last ? 0 : -sum.count, next_column = last ? 0 : d + width;
  int64_t end = last ? sum.count + sum.later : sum.count;
  Vector<C> total[Registers] = {};
  for (int64_t i = 0; i < sum.count; ++i) {
    bool here = i + rows < sum.count;
    if (int64_t ahead = i + rows + (here ? 0 : next_row); ahead < end) {
      const T* next = sum.row(ahead) + (here ? d : next_column);
      for (int64_t offset = 0; offset < width; offset += line) prefetch<Cached>(next + offset);
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
  auto blocks = [&]<bool Cached, int Registers>() {
    for (int64_t width = Registers * kLanes<C>; d + width <= D; d += width)
      gather_block<Cached, Registers>(sum, d, d + width >= D, out);
  };
  if (sum.cached) blocks.template operator()<true, 8>();
  // Wide blocks only where they fill the row: with narrow ones after them, both are slower.
  if constexpr (kVectorBytes == 64) {
    if (D % (16 * kLanes<C>) == 0) blocks.template operator()<false, 16>();
  }
  blocks.template operator()<false, 8>();
  blocks.template operator()<false, 2>();
  blocks.template operator()<false, 1>();
  for (; d < D; ++d) {
    C total = 0;
    for (int64_t i = 0; i < sum.count; ++i) total += sum.coefficients[i] * to_float(sum.row(i)[d]);
    from_float(total, out[d]);
  }
}

}  // namespace fastsparse::FASTSPARSE_ISA
