// What every method of matching pursuit does to one residual, to the same bits: the key that an atom is chosen by, its
// coefficient, the step, and the bound within which other ways to a score must lie to rule atoms out.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/dot.h"
#include "cpu/matching_pursuit.h"

namespace fastsparse::FASTSPARSE_ISA {

// Larger, NaN before all. Whoever asks goes through the atoms in their order: a tie stays with the lowest.
template <typename C> inline bool beats(C key, C best) { return key > best || (key != key && best == best); }

// The key of an atom by its product with the residual, which `dots` sums in its one order. Of a zero atom 0.
template <typename C> inline C key_of(C product, int64_t m, const AtomNorms& norms, bool nonnegative) {
  // In fp64: the reciprocal of a tiny or huge norm may be out of fp32's range.
  if (norms.inverse) product = norms.squares[m] == 0 ? C(0) : C(double(product) * norms.inverse[m]);
  return nonnegative ? product : std::fabs(product);
}

template <typename C> inline C coefficient_of(C product, int64_t m, const AtomNorms& norms) {
  if (!norms.squares) return product;
  return norms.squares[m] == 0 ? C(0) : C(double(product) / norms.squares[m]);
}

template <typename T> inline void subtract(Accumulator<T>* r, Accumulator<T> value, const T* atom, int64_t D) {
  using C = Accumulator<T>;
  const Vector<C> by = broadcast(value);
  int64_t d = 0;
  for (; d + kLanes<C> <= D; d += kLanes<C>) store(load(r + d) - by * load(atom + d), r + d);
  for (; d < D; ++d) r[d] -= value * C(to_float(atom[d]));
}

// How far keys may be off, of residuals r with |r| <= R, A being the norm of what is scored, u the unit roundoff and g =
// 2 D u / (1 - 2 D u) (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1; products of any order, and
// twice as much, since the library's threads may round in any direction):
//   a product, of r with the atom over its norm or as it is, times a reciprocal    (g + 16 u) A R
//   below u times the least normal number, in absolute terms, flushed or not       floor
template <typename C> class KeyError {
 public:
  static constexpr double unit = std::numeric_limits<C>::epsilon() / 2;
  static constexpr double infinite = std::numeric_limits<double>::infinity();
  static constexpr double safety = 1.001;  // for the rounding of the bound itself

  KeyError(int64_t D, const AtomSizes& sizes) : sizes_(sizes) {
    double g = 2 * double(D) * unit;
    product_ = g < 0.5 ? g / (1 - g) : infinite;
    floor_ = 8 * double(D + 8) * double(std::numeric_limits<C>::min()) * (1 + 1 / sizes.smallest);
  }
  double product() const { return product_; }
  double largest() const { return sizes_.largest; }
  double floor(double R) const { return floor_ * (1 + R); }
  double of_product(double R) const { return (product_ + 16 * unit) * sizes_.largest * R + floor(R); }
  // Whether no product, norm or score can leave the range of the type.
  bool tame(double R) const { return 4 * R * (1 + sizes_.largest_raw) < double(std::numeric_limits<C>::max()); }

 private:
  AtomSizes sizes_;
  double product_, floor_;
};

}  // namespace fastsparse::FASTSPARSE_ISA
