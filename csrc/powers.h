// Polynomial activations (Zhuo et al. 2024, arXiv 2411.03884), in whatever numbers a kernel computes with: V is a number or
// a vector of them, C what sums are carried in. The weight of the cube comes first, as everything of the three powers does.
//
// PolyNorm divides the powers of a row by their root mean squares: y = sum_p k_p x^p + b with k_p = a_p s_p, s_p =
// (mean_d x^(2p) + eps)^-1/2. With c_p = sum_d g x^p the gradients are da_p = sum_rows s_p c_p and
//   dx = sum_p p k_p x^(p-1) (g - w_p x^p), w_p = s_p^2 c_p / D.
// PolyReLU is a polynomial in relu(x): s_p = 1, w_p = 0, and dx = 0 where x is at most 0. NaN stays NaN.
#pragma once

#include "inline.h"

namespace fastsparse {

enum class PolynomialKind : int { norm, relu };

inline constexpr int kPowers = 3;

struct PolyNorm {
  static constexpr bool kNormed = true;

  template <typename V> static FASTSPARSE_INLINE V base(V x) { return x; }
  template <typename V, typename C>
  static FASTSPARSE_INLINE V back(V x, V g, const C (&k)[kPowers], const C (&w)[kPowers]) {
    V x2 = x * x;
    return (3 * k[0]) * x2 * (g - w[0] * (x2 * x)) + (2 * k[1]) * x * (g - w[1] * x2) + k[2] * (g - w[2] * x);
  }
};

struct PolyRelu {
  static constexpr bool kNormed = false;

  template <typename V> static FASTSPARSE_INLINE V base(V x) { return x <= V{} ? V{} : x; }
  template <typename V, typename C>
  static FASTSPARSE_INLINE V back(V x, V g, const C (&k)[kPowers], const C (&)[kPowers]) {
    V slope = (3 * k[0]) * (x * x) + (2 * k[1]) * x + k[2];
    return x <= V{} ? V{} : slope * g;
  }
};

// The sum of weighted powers of a base.
template <typename V, typename C> FASTSPARSE_INLINE V weighted_powers(V x, const C (&k)[kPowers], C bias) {
  V x2 = x * x;
  return k[0] * (x2 * x) + k[1] * x2 + k[2] * x + bias;
}

// What a row is summed up to: the squares of its powers, and its powers times g, and g.
template <typename V> struct PolynomialSums {
  V squares[kPowers], products[kPowers + 1];

  FASTSPARSE_INLINE void add_squares(V x) {
    V x2 = x * x, x3 = x2 * x;
    squares[0] += x3 * x3;
    squares[1] += x2 * x2;
    squares[2] += x2;
  }
  FASTSPARSE_INLINE void add_products(V x, V g) {
    V x2 = x * x;
    products[0] += x2 * x * g;
    products[1] += x2 * g;
    products[2] += x * g;
    products[3] += g;
  }
};

}  // namespace fastsparse
