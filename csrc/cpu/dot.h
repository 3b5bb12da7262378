// Inner products of gathered rows, which sddmm and topk_encode's refinement share.
#pragma once

#include "cpu/simd.h"

namespace fastsparse::FASTSPARSE_ISA {

// out[i] = <x, rows[i]> for `Count` rows at once: their loads overlap, and x is read once. Each product is summed in
// one fixed order, whatever its company.
template <int Count, typename T>
inline void dots(const T* x, const T* const (&rows)[Count], int64_t D, Accumulator<T> (&out)[Count]) {
  using C = Accumulator<T>;
  constexpr int lanes = kLanes<C>;
  Vector<C> even[Count] = {}, odd[Count] = {};
  int64_t d = 0;
  for (; d + 2 * lanes <= D; d += 2 * lanes) {
    Vector<C> x_even = load(x + d), x_odd = load(x + d + lanes);
#pragma GCC unroll 8
    for (int i = 0; i < Count; ++i) {
      even[i] += x_even * load(rows[i] + d);
      odd[i] += x_odd * load(rows[i] + d + lanes);
    }
  }
  for (; d + lanes <= D; d += lanes) {
    Vector<C> x_even = load(x + d);
#pragma GCC unroll 8
    for (int i = 0; i < Count; ++i) even[i] += x_even * load(rows[i] + d);
  }
  for (int i = 0; i < Count; ++i) out[i] = sum<C>(even[i] + odd[i]);
  for (; d < D; ++d) {
    C x_d = to_float(x[d]);
    for (int i = 0; i < Count; ++i) out[i] += x_d * to_float(rows[i][d]);
  }
}

}  // namespace fastsparse::FASTSPARSE_ISA
