// Inner products of gathered rows, and norms.
#pragma once

#include "cpu/simd.h"

namespace fastsparse::FASTSPARSE_ISA {

// out[i] = <x, rows[i]> for `Count` rows at once: their loads overlap, and x is read once. Each product is summed in
// one fixed order, whatever its company. What fills no vector, or no pair of them, comes first: reading it calls a
// function, before which sums would leave their registers, and they would in the loop, too.
template <int Count, typename X, typename T>
inline void dots(const X* x, const T* const (&rows)[Count], int64_t D, Accumulator<T> (&out)[Count]) {
  using C = Accumulator<T>;
  constexpr int lanes = kLanes<C>;
  Vector<C> even[Count] = {}, odd[Count] = {};
  // By vectors too: of a scalar loop the compiler fuses multiplication and addition for some `Count` alone.
  int64_t pairs = D / (2 * lanes) * (2 * lanes);
  for (int64_t d = pairs; d < D; d += lanes) {
    Vector<C> x_even = load_up_to(x + d, D - d);
#pragma GCC unroll 8
    for (int i = 0; i < Count; ++i) even[i] += x_even * load_up_to(rows[i] + d, D - d);
  }
  for (int64_t d = 0; d < pairs; d += 2 * lanes) {
    Vector<C> x_even = load(x + d), x_odd = load(x + d + lanes);
#pragma GCC unroll 8
    for (int i = 0; i < Count; ++i) {
      even[i] += x_even * load(rows[i] + d);
      odd[i] += x_odd * load(rows[i] + d + lanes);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Count; ++i) out[i] = sum<C>(even[i] + odd[i]);
}

// |row|^2 in fp64, where the squares of all fp32 numbers fit.
template <typename T> inline double squared_norm(const T* row, int64_t D) {
  using C = Accumulator<T>;
  typedef C Part __attribute__((vector_size(kLanes<double> * sizeof(C))));
  constexpr int lanes = kLanes<C>, parts = lanes / kLanes<double>;
  Vector<double> total[parts] = {};
  auto add = [&](Vector<C> entries) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int p = 0; p < parts; ++p) {
      Part part;
      std::memcpy(&part, reinterpret_cast<const char*>(&entries) + p * sizeof part, sizeof part);
      Vector<double> wide = __builtin_convertvector(part, Vector<double>);
      total[p] += wide * wide;
    }
  };
  int64_t whole = D / lanes * lanes;
  if (whole < D) add(load_up_to(row + whole, D - whole));
  for (int64_t d = 0; d < whole; d += lanes) add(load(row + d));
  double result = 0;
  for (int p = 0; p < parts; ++p) result += sum<double>(total[p]);
  return result;
}

}  // namespace fastsparse::FASTSPARSE_ISA
