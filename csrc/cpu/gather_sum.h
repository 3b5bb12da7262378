// The loop that spmm and spmm_t share: a weighted sum of gathered rows.
#pragma once

#include <algorithm>

#include "cpu/fetch.h"
#include "cpu/simd.h"

namespace fastsparse::FASTSPARSE_ISA {

// sum_i coefficients[i] * matrix[rows[i]]. After rows[count] come `later` more, which the caller will gather next.
template <typename T> struct Gather {
  const Accumulator<T>* coefficients;
  const int64_t* rows;
  int64_t count, later;
  const T* matrix;
  int64_t row_stride;
  Fetch fetch;

  const T* row(int64_t i) const { return matrix + rows[i] * row_stride; }
};

// How many rows ahead a block of columns is prefetched: the addresses are random, so the hardware can't.
template <Fetch How, typename T> constexpr int64_t rows_ahead(int64_t columns) {
  constexpr int64_t ahead = How == Fetch::near ? 3 : How == Fetch::wide ? 18 : 12;
  return std::min<int64_t>(24, (ahead << 10) / (columns * int64_t(sizeof(T))));
}

// `Registers` vectors of columns from d on; they stay in registers over all terms, so each output is written once. What
// is prefetched runs on past the last term: into these rows' next columns, or into the first columns of later rows.
template <Fetch How, int Registers, typename T, typename Out>
inline void gather_block(const Gather<T>& sum, int64_t d, bool last, Out* out) {
  using C = Accumulator<T>;
  constexpr int64_t lanes = kLanes<C>, width = Registers * lanes, line = 64 / sizeof(T);
  constexpr int64_t rows = rows_ahead<How, T>(width);
  int64_t next_row = last ? 0 : -sum.count, next_column = last ? 0 : d + width;
  int64_t end = last ? sum.count + sum.later : sum.count;
  Vector<C> total[Registers] = {};
  for (int64_t i = 0; i < sum.count; ++i) {
    bool here = i + rows < sum.count;
    if (int64_t ahead = i + rows + (here ? 0 : next_row); ahead < end) {
      const T* next = sum.row(ahead) + (here ? d : next_column);
#pragma GCC unroll 24
      for (int64_t offset = 0; offset < width; offset += line) prefetch<How == Fetch::near || How == Fetch::deep>(next + offset);
    }
    const T* row = sum.row(i) + d;
    Vector<C> coefficient = broadcast(sum.coefficients[i]);
#pragma GCC unroll 24
    for (int r = 0; r < Registers; ++r) total[r] += coefficient * load(row + r * lanes);
  }
#pragma GCC unroll 24
  for (int r = 0; r < Registers; ++r) store(total[r], out + d + r * lanes);
}

// Columns [d, d + width) of the sum, whole rows of them together: their lines come from memory one after another, and
// totals go to and from the first cache meanwhile. `last` as above.
inline constexpr int64_t kTotals = 1024;
template <typename T, typename Out>
inline void gather_rows(const Gather<T>& sum, int64_t d, int64_t width, bool last, Out* out) {
  using C = Accumulator<T>;
  constexpr int64_t lanes = kLanes<C>, line = 64 / sizeof(T);
  alignas(64) C totals[kTotals] = {};
  const int64_t end = sum.count + (last ? sum.later : 0);
  auto add = [&]<int Rows>(int64_t first) __attribute__((always_inline)) {
    Vector<C> coefficients[Rows];
    const T *rows[Rows], *ahead[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      int64_t next = first + Rows + r;
      coefficients[r] = broadcast(sum.coefficients[first + r]);
      rows[r] = sum.row(first + r) + d;
      ahead[r] = sum.row(std::min(next, end - 1)) + (next < sum.count ? d : 0);
    }
    for (int64_t c = 0; c < width; c += lanes) {
      if (c % line == 0)
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) prefetch(ahead[r] + c);
      Vector<C> total = load(totals + c);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) total += coefficients[r] * load(rows[r] + c);
      store(total, totals + c);
    }
  };
  int64_t i = 0;
  for (; i + 8 <= sum.count; i += 8) add.template operator()<8>(i);
  for (; i < sum.count; ++i) add.template operator()<1>(i);
  for (int64_t c = 0; c < width; c += lanes) store(load(totals + c), out + d + c);
}

// out[0:D] = the sum, its terms added in order.
template <typename T, typename Out> inline void gather_sum(const Gather<T>& sum, int64_t D, Out* out) {
  using C = Accumulator<T>;
  int64_t d = 0;
  auto blocks = [&]<Fetch How, int Registers>() {
    for (int64_t width = Registers * kLanes<C>; d + width <= D; d += width)
      gather_block<How, Registers>(sum, d, d + width >= D, out);
  };
  if (sum.fetch == Fetch::near) blocks.template operator()<Fetch::near, 8>();
  if constexpr (kVectorBytes == 32) {
    if (sum.fetch == Fetch::far)
      for (const int64_t whole = D / kLanes<C> * kLanes<C>; d < whole; d += std::min(kTotals, whole - d))
        gather_rows(sum, d, std::min(kTotals, whole - d), d + kTotals >= D, out);
  }
  if constexpr (kVectorBytes == 64) {
    if (sum.fetch == Fetch::deep) {
      blocks.template operator()<Fetch::deep, 24>();
      blocks.template operator()<Fetch::deep, 8>();
    }
    if (sum.fetch == Fetch::wide) blocks.template operator()<Fetch::wide, 24>();
    // Zen 4 wants wide blocks only where they fill the row: with narrow ones after them, both are slower.
    else if (D % (16 * kLanes<C>) == 0) blocks.template operator()<Fetch::far, 16>();
  }
  blocks.template operator()<Fetch::far, 8>();
  blocks.template operator()<Fetch::far, 2>();
  blocks.template operator()<Fetch::far, 1>();
  for (; d < D; ++d) {
    C total = 0;
    for (int64_t i = 0; i < sum.count; ++i) total += sum.coefficients[i] * to_float(sum.row(i)[d]);
    from_float(total, out[d]);
  }
}

}  // namespace fastsparse::FASTSPARSE_ISA
