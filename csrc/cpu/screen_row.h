// One row of a screen: what a filter keeps of bf16 scores in brackets around the exact ones.
#pragma once

#include "cpu/bracket.h"
#include "cpu/candidates.h"

namespace fastsparse::FASTSPARSE_ISA {

// The filter is one as of filter_row, for keys that are known to lie between bounds.
template <bool Keyed, typename Filter>
void screen_row(const Filter& filter, const Candidates& candidates, const Stripe& stripe, int64_t n) {
  constexpr int lanes = kLanes<float>;
  List<float> list(candidates, n);
  if (list.count == kHopeless) return;
  const Bracketed<Keyed> scores(stripe, candidates.absolute, n);
  if (!scores.is_finite()) {
    list.count = kHopeless;
    return;
  }
  float most = scores.most_error();

  if (stripe.begin == 0)
    filter.begin(list, stripe.count, [&](int64_t v) {
      auto at = scores.at(v);
      return at.key - scores.error(at, v);
    });
  else if (stripe.doubled) filter.raise(list);
  for (int64_t v = 0; v < stripe.count; v += lanes) {
    auto at = scores.at(v);
    uint32_t passing = not_below(at.key + at.rounding, broadcast(list.threshold - most));
    if (__builtin_expect(passing == 0, 1)) continue;
    Vector<float> gap = scores.error(at, v), upper = at.key + gap, lower = at.key - gap;
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

}  // namespace fastsparse::FASTSPARSE_ISA
