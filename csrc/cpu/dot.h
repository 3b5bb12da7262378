// Inner products of gathered rows, and norms.
#pragma once

#include "cpu/simd.h"

namespace fastsparse::FASTSPARSE_ISA {

// out[i] = <x, rows[i]> for `Count` rows at once: their loads overlap, and x is read once. Each product is summed in
// one fixed order, whatever its company.
template <int Count, typename X, typename T>
inline void dots(const X* x, const T* const (&rows)[Count], int64_t D, Accumulator<T> (&out)[Count]) {
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
  // The rest by vectors too: of a scalar loop the compiler fuses multiplication and addition for some `Count` alone.
  for (; d < D; d += lanes) {
    Vector<C> x_even = load_up_to(x + d, D - d);
#pragma GCC unroll 8
    for (int i = 0; i < Count; ++i) even[i] += x_even * load_up_to(rows[i] + d, D - d);
  }
  for (int i = 0; i < Count; ++i) out[i] = sum<C>(even[i] + odd[i]);
}

// |row|^2 in fp64, where the squares of all fp32 numbers fit.
template <typename T> inline double squared_norm(const T* row, int64_t D) {
  using C = Accumulator<T>;
  typedef C Part __attribute__((vector_size(kLanes<double> * sizeof(C))));
  constexpr int lanes = kLanes<C>, parts = lanes / kLanes<double>;
  Vector<double> total[parts] = {};
  for (int64_t d = 0; d < D; d += lanes) {
    Vector<C> entries = load_up_to(row + d, D - d);
    for (int p = 0; p < parts; ++p) {
      Part part;
      std::memcpy(&part, reinterpret_cast<const char*>(&entries) + p * sizeof part, sizeof part);
      Vector<double> wide = __builtin_convertvector(part, Vector<double>);
      total[p] += wide * wide;
    }
  }
  double result = 0;
  for (int p = 0; p < parts; ++p) result += sum<double>(total[p]);
  return result;
}

}  // namespace fastsparse::FASTSPARSE_ISA
