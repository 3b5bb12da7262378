// A row's scores in a stripe of a screen, in brackets around the exact ones.
#pragma once

#include <cfloat>

#include "cpu/screen.h"
#include "cpu/simd.h"

namespace fastsparse::FASTSPARSE_ISA {

// Error bracket. With x = x~ + dx, w = w~ + dw, X = |x~|, W = |w~| and g = D 2^-24, by Cauchy-Schwarz
//   |x.w - x~.w~|               <= |dx| W + (X + |dx|) |dw|
//   the product's accumulation  <= 2 g X W, whichever way the library's threads round
//   the exact score's own       <= g (X + |dx|) (W + |dw|)
//   the product's bf16 result   <= 2^-8 |s~|
// (of integers: none, but three roundings of the result, 3 2^-24 |s~|, for which kRounding has room; BFMMLA adds products
// in twos and those sums one after another, each time off by at most 2^-23, for it rounds to odd: D / 2 + 1 times, that
// is (D + 2) 2^-24 X W, which is not more, and nothing for D = 1)
// which sums to A W + B |dw| + 2^-8 |s~| with A = |dx| (1 + g) + 3 g X and B = (X + |dx|)(1 + g). A processor that
// flushes subnormals adds at most 2^-126 a term, on top of operands that it takes for zeros, and BFMMLA, which always
// does, twice that, for it flushes products and both sums; the bias's rounding is relative to it. They go into `rest` and
// `residual` (edge/scorer.cpp). Inf and NaN in any of these widen the bracket to everything.

inline constexpr float kSafety = 1.001f;              // for the rounding of the bracket itself
inline constexpr float kRounding = 0x1p-8f * 1.01f;   // bf16's unit roundoff

// `Keyed`: keys differ from scores, by a scale or an absolute value.
template <bool Keyed> class Bracketed {
 public:
  struct Scored { Vector<float> key, rounding; };

  Bracketed(const Stripe& stripe, bool absolute, int64_t n)
      : scores_(static_cast<const bf16*>(stripe.scores) + n * stripe.count), count_(stripe.count), absolute_(absolute),
        bias_(static_cast<const float*>(stripe.bias)), scale_(static_cast<const float*>(stripe.scale)),
        of_(stripe.brackets), x_norm_(stripe.x_norm[n]), x_residual_(stripe.x_residual[n]) {
    float g = float(stripe.D) * 0x1p-24f;
    a_ = broadcast(kSafety * (x_residual_ * (1 + g) + 3 * g * x_norm_));
    b_ = broadcast(kSafety * (x_norm_ + x_residual_) * (1 + g));
  }

  bool is_finite() const { return x_norm_ <= FLT_MAX && x_residual_ <= FLT_MAX; }

  __attribute__((always_inline)) Scored at(int64_t v) const {
    Vector<float> score = load_up_to(scores_ + v, count_ - v), key = score + load(bias_ + v);
    if constexpr (Keyed) {
      if (scale_) {
        Vector<float> factor = load(scale_ + v);
        score *= factor;
        key *= factor;
      }
      if (absolute_) key = absolute(key);
    }
    return Scored{key, broadcast(kRounding) * absolute(score)};
  }
  __attribute__((always_inline)) Vector<float> error(Scored scored, int64_t v) const {
    return a_ * load(of_.norm + v) + (b_ * load(of_.residual + v) + load(of_.rest + v)) + scored.rounding;
  }
  // The largest error of the stripe, but for `rounding`, needs none of the per-latent terms, which are more than the
  // first cache holds.
  float most_error() const { return a_[0] * of_.most_norm + (b_[0] * of_.most_residual + of_.most_rest); }

 private:
  const bf16* scores_;
  int64_t count_;
  bool absolute_;
  const float *bias_, *scale_;
  Brackets of_;
  float x_norm_, x_residual_;
  Vector<float> a_, b_;
};

}  // namespace fastsparse::FASTSPARSE_ISA
