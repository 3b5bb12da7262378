#include "cpu/screen.h"

#include <algorithm>

#include "cpu/screen_row.h"

namespace fastsparse::FASTSPARSE_ISA {

namespace {

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

// A filter of screen_row that keeps what may be among the k largest.
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
