// Kernels' view of the candidates of a row (see screen.h), and bounds on the k-th largest of some numbers.
#pragma once

#include <type_traits>

#include "cpu/screen.h"
#include "cpu/simd.h"

namespace fastsparse::FASTSPARSE_ISA {

template <typename C> inline constexpr C kInfinity = __builtin_inf();

// One row's list.
template <typename C> struct List {
  C *first, *second;
  int32_t* latent;
  int32_t& count;
  C& threshold;

  List(const Candidates& candidates, int64_t n)
      : first(reinterpret_cast<C*>(static_cast<char*>(candidates.lists) +
                                   n * list_bytes(candidates.capacity, sizeof(C)))),
        second(first + candidates.capacity + kSlack),
        latent(reinterpret_cast<int32_t*>(second + candidates.capacity + kSlack)), count(candidates.count[n]),
        threshold(static_cast<C*>(candidates.threshold)[n]) {}

  void append(Vector<C> firsts, Vector<C> seconds, int64_t first_latent, uint32_t lanes) {
    compress(firsts, lanes, first + count);
    compress(seconds, lanes, second + count);
    compress_consecutive(int32_t(first_latent), lanes, latent + count);
    count += __builtin_popcount(lanes);
  }
};

inline uint32_t lanes_left(int64_t left, int lanes) { return left >= lanes ? ~0u : (1u << left) - 1; }

// A lower bound on the k-th largest of `count` values, none of them NaN, and close to it: any number that k of them
// reach is one. Bisection counts whole vectors without a branch, where a selection would mispredict at every element.
// It runs over the numbers' bits, mapped to integers of the same order: any range of magnitudes takes few steps.
template <typename C> C bound_by_bisection(const C* values, int64_t count, int64_t k) {
  using Order = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;
  using Distance = std::make_unsigned_t<Order>;
  constexpr int lanes = kLanes<C>, steps = 24;
  auto flip = [](Order bits) { return bits < 0 ? Order(~bits ^ Order(Distance(1) << (8 * sizeof(C) - 1))) : bits; };
  auto order_of = [&](C value) {
    Order bits;
    std::memcpy(&bits, &value, sizeof bits);
    return flip(bits);
  };
  auto number_of = [&](Order order) {
    Order bits = flip(order);
    C value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  };
  Order low = order_of(-kInfinity<C>), high = order_of(kInfinity<C>);  // k values reach the first
  for (int step = 0; step < steps && low < high; ++step) {
    Distance distance = Distance(high) - Distance(low);
    Order middle = Order(Distance(low) + distance / 2 + distance % 2);
    C bound = number_of(middle);
    int64_t reaching = 0;
    for (int64_t i = 0; i < count; i += lanes)
      reaching += __builtin_popcount(not_below(load(values + i), broadcast(bound)) & lanes_left(count - i, lanes));
    if (reaching < k) high = middle - 1;
    else low = middle;
    if (reaching == k) break;
  }
  return number_of(low);
}

// A lower bound on the row's k-th largest key before any candidate is known: with the stripe's latents dealt into
// groups, the k-th largest of the groups' maxima. `keys(v)` gives the vector of lower bounds at latent v.
template <typename C, typename Keys> C bound_by_groups(int64_t k, int64_t count, const Keys& keys) {
  constexpr int lanes = kLanes<C>;
  constexpr int64_t most = 1024;
  int64_t groups = (4 * k + lanes - 1) / lanes * lanes;
  if (groups > most || count < 2 * groups) return -kInfinity<C>;
  C maxima[most];
  for (int64_t g = 0; g < groups; ++g) maxima[g] = -kInfinity<C>;
  for (int64_t v = 0, g = 0; v + lanes <= count; v += lanes) {
    store(at_least(keys(v), load(maxima + g)), maxima + g);
    if ((g += lanes) == groups) g = 0;
  }
  return bound_by_bisection(maxima, groups, k);
}

// Adds a stripe's candidates to a row's, by a filter: it sets the threshold before the first stripe, and raises it, or
// drops candidates, when twice as many latents have been seen and when the list is full.
template <typename C, template <typename> typename Filter>
void filter_row(const Filter<C>& filter, const Candidates& candidates, const Stripe& stripe, int64_t n) {
  constexpr int lanes = kLanes<C>;
  const C* scores = static_cast<const C*>(stripe.scores) + n * stripe.count;
  auto* bias = static_cast<const C*>(stripe.bias);
  auto* scale = static_cast<const C*>(stripe.scale);
  auto score_at = [&](int64_t v) { return load_up_to(scores + v, stripe.count - v) + load(bias + v); };
  auto key_of = [&](Vector<C> score, int64_t v) {
    if (scale) score *= load(scale + v);
    return candidates.absolute ? absolute(score) : score;
  };

  List<C> list(candidates, n);
  if (stripe.begin == 0) filter.begin(list, stripe.count, [&](int64_t v) { return key_of(score_at(v), v); });
  else if (stripe.doubled) filter.raise(list);
  for (int64_t v = 0; v < stripe.count; v += lanes) {
    Vector<C> score = score_at(v), key = key_of(score, v);
    // Strictly above: a later latent loses a tie. NaN passes.
    uint32_t passing = not_at_most(key, broadcast(list.threshold)) & lanes_left(stripe.count - v, lanes);
    if (__builtin_expect(passing == 0, 1)) continue;
    list.append(key, score, stripe.begin + v, passing);
    if (list.count > candidates.capacity) filter.raise(list);
  }
}

template <typename C> struct Candidate {
  C key, score;
  int32_t latent;
};

// The order of the result: larger key first, NaN before all, ties to the lower latent.
struct Better {
  template <typename C> bool operator()(const Candidate<C>& a, const Candidate<C>& b) const {
    if (a.key > b.key) return true;
    if (a.key < b.key) return false;
    bool a_nan = a.key != a.key, b_nan = b.key != b.key;
    return a_nan != b_nan ? a_nan : a.latent < b.latent;
  }
};

}  // namespace fastsparse::FASTSPARSE_ISA
