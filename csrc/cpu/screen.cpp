#include "cpu/screen.h"

#include <algorithm>
#include <cfloat>

#include "cpu/candidates.h"

namespace fastsparse::FASTSPARSE_ISA {

// Error bracket. With x = x~ + dx, w = w~ + dw, X = |x~|, W = |w~| and g = D 2^-24, by Cauchy-Schwarz
//   |x.w - x~.w~|               <= |dx| W + (X + |dx|) |dw|
//   the product's accumulation  <= 2 g X W, whichever way the library's threads round
//   the exact score's own       <= g (X + |dx|) (W + |dw|)
//   the product's bf16 result   <= 2^-8 |s~|
// which sums to A W + B |dw| + 2^-8 |s~| with A = |dx| (1 + g) + 3 g X and B = (X + |dx|)(1 + g). A processor that
// flushes subnormals adds at most 2^-126 a term; the bias's rounding is relative to it. Both go into `rest` and
// `residual` (edge/scorer.cpp). Inf and NaN in any of these widen the bracket to everything.

namespace {

inline constexpr float kSafety = 1.001f;              // for the rounding of the bracket itself
inline constexpr float kRounding = 0x1p-8f * 1.01f;   // bf16's unit roundoff

float largest(Vector<float> values, uint32_t lanes) {
  float result = -kInfinity<float>;
  for (; lanes; lanes &= lanes - 1) result = std::max(result, float(values[__builtin_ctz(lanes)]));
  return result;
}

// Raises the threshold by the candidates' lower bounds and drops who can't reach it; keeps the order.
void certify(List<float>& list, int64_t k) {
  constexpr int lanes = kLanes<float>;
  if (list.count > k) {
    float bound = bound_by_bisection(list.second, list.count, k);
    if (bound > list.threshold) list.threshold = bound;
  }
  int32_t total = list.count;
  list.count = 0;
  for (int32_t i = 0; i < total; i += lanes) {  // appends behind what has been read
    Vector<float> upper = load(list.first + i), lower = load(list.second + i);
    int32_t latents[lanes];
    std::memcpy(latents, list.latent + i, sizeof latents);
    uint32_t reaching = not_below(upper, broadcast(list.threshold)) & lanes_left(total - i, lanes);
    compress(upper, reaching, list.first + list.count);
    compress(lower, reaching, list.second + list.count);
    for (; reaching; reaching &= reaching - 1) list.latent[list.count++] = latents[__builtin_ctz(reaching)];
  }
}

// A filter as those of filter_row, for keys that are known to lie between bounds. This one keeps what may be among the k
// largest.
struct Largest {
  int64_t k;
  // For the largest alone the candidates themselves will raise the threshold, once there is one.
  bool single = k == 1;

  template <typename Keys> void begin(List<float>& list, int64_t count, const Keys& lower) const {
    list.threshold = bound_by_groups<float>(k, single ? std::min<int64_t>(count, 512) : count, lower);
  }
  void raise(List<float>& list) const { certify(list, k); }
  void add(List<float>& list, Vector<float> lower, uint32_t lanes) const {
    if (single) list.threshold = std::max(list.threshold, largest(lower, lanes));
  }
};

// `Keyed`: keys differ from scores, by a scale or an absolute value.
template <bool Keyed, typename Filter>
void screen_row(const Filter& filter, const Candidates& candidates, const Stripe& stripe, int64_t n) {
  constexpr int lanes = kLanes<float>;
  List<float> list(candidates, n);
  if (list.count == kHopeless) return;
  float x_norm = stripe.x_norm[n], x_residual = stripe.x_residual[n];
  if (!(x_norm <= FLT_MAX && x_residual <= FLT_MAX)) {
    list.count = kHopeless;
    return;
  }
  float g = float(stripe.D) * 0x1p-24f;
  const Vector<float> a = broadcast(kSafety * (x_residual * (1 + g) + 3 * g * x_norm));
  const Vector<float> b = broadcast(kSafety * (x_norm + x_residual) * (1 + g));
  const bf16* scores = static_cast<const bf16*>(stripe.scores) + n * stripe.count;
  const float *bias = static_cast<const float*>(stripe.bias), *scale = static_cast<const float*>(stripe.scale);
  const float *norm = stripe.brackets.norm, *residual = stripe.brackets.residual, *rest = stripe.brackets.rest;

  struct Scored { Vector<float> key, rounding; };
  auto scored = [&](int64_t v) __attribute__((always_inline)) {
    Vector<float> score = load_up_to(scores + v, stripe.count - v), key = score + load(bias + v);
    if constexpr (Keyed) {
      if (scale) {
        Vector<float> factor = load(scale + v);
        score *= factor;
        key *= factor;
      }
      if (candidates.absolute) key = absolute(key);
    }
    return Scored{key, broadcast(kRounding) * absolute(score)};
  };
  auto error = [&](Scored at, int64_t v) __attribute__((always_inline)) {
    return a * load(norm + v) + (b * load(residual + v) + load(rest + v)) + at.rounding;
  };
  // The largest error of the stripe needs none of the per-latent terms, which are more than the first cache holds.
  float most = a[0] * stripe.brackets.most_norm + (b[0] * stripe.brackets.most_residual + stripe.brackets.most_rest);

  if (stripe.begin == 0)
    filter.begin(list, stripe.count, [&](int64_t v) {
      Scored at = scored(v);
      return at.key - error(at, v);
    });
  else if (stripe.doubled) filter.raise(list);
  for (int64_t v = 0; v < stripe.count; v += lanes) {
    Scored at = scored(v);
    uint32_t passing = not_below(at.key + at.rounding, broadcast(list.threshold - most));
    if (__builtin_expect(passing == 0, 1)) continue;
    Vector<float> gap = error(at, v), upper = at.key + gap, lower = at.key - gap;
    passing &= not_below(upper, broadcast(list.threshold)) & lanes_left(stripe.count - v, lanes);
    if (passing == 0) continue;
    lower = at_least(lower, broadcast(-kInfinity<float>));
    list.append(upper == upper ? upper : broadcast(kInfinity<float>), lower, stripe.begin + v, passing);
    filter.add(list, lower, passing);
    if (list.count > candidates.capacity) {
      filter.raise(list);
      if (list.count > candidates.capacity / 4 * 3) {
        list.count = kHopeless;
        return;
      }
    }
  }
}

}  // namespace

void screen(const Candidates& candidates, const Stripe& stripe, int64_t row_begin, int64_t row_end) {
  bool keyed = stripe.scale || candidates.absolute;
  Largest filter{candidates.k};
  for (int64_t n = row_begin; n < row_end; ++n)
    if (keyed) screen_row<true>(filter, candidates, stripe, n);
    else screen_row<false>(filter, candidates, stripe, n);
}

void screen_certify(const Candidates& candidates, int64_t row_begin, int64_t row_end) {
  for (int64_t n = row_begin; n < row_end; ++n) {
    List<float> list(candidates, n);
    if (list.count != kHopeless) certify(list, candidates.k);
  }
}

}  // namespace fastsparse::FASTSPARSE_ISA
