#include "cpu/topk_encode.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <memory>
#include <type_traits>

#include "cpu/candidates.h"
#include "cpu/dot.h"

namespace fastsparse::FASTSPARSE_ISA {

namespace {

template <typename C> inline constexpr C kInfinity = __builtin_inf();

// The k best of a list, in no order, at the front of `scratch`.
template <typename C> void find_best(const List<C>& list, int64_t k, Candidate<C>* scratch) {
  for (int32_t i = 0; i < list.count; ++i) scratch[i] = {list.first[i], list.second[i], list.latent[i]};
  if (list.count > k) std::nth_element(scratch, scratch + k - 1, scratch + list.count, Better{});
}

uint32_t lanes_left(int64_t left, int lanes) { return left >= lanes ? ~0u : (1u << left) - 1; }

float largest(Vector<float> values, uint32_t lanes) {
  float result = -kInfinity<float>;
  for (; lanes; lanes &= lanes - 1) result = std::max(result, float(values[__builtin_ctz(lanes)]));
  return result;
}

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

// ---- rows in the product's type ----

template <typename T> void round_row(const T* row, int64_t D, bf16* rounded, float& norm, float& residual) {
  constexpr int lanes = kLanes<float>;
  Vector<float> norm_lanes = {}, residual_lanes = {};
  int64_t d = 0;
  for (; d + lanes <= D; d += lanes) {
    Vector<float> exact = load(row + d);
    store(exact, rounded + d);
    Vector<float> near = load(rounded + d), gap = exact - near;
    norm_lanes += near * near;
    residual_lanes += gap * gap;
  }
  float norm_squared = sum<float>(norm_lanes), residual_squared = sum<float>(residual_lanes);
  for (; d < D; ++d) {
    float exact = to_float(row[d]);
    from_float(exact, rounded[d]);
    float near = to_float(rounded[d]), gap = exact - near;
    norm_squared += near * near;
    residual_squared += gap * gap;
  }
  double wide_norm = norm_squared, wide_residual = residual_squared;
  if (!(norm_squared > 1e-25f && norm_squared < 1e30f)) {  // squares may have left fp32's range
    wide_norm = wide_residual = 0;
    for (d = 0; d < D; ++d) {
      double near = to_float(rounded[d]), gap = double(to_float(row[d])) - near;
      wide_norm += near * near;
      wide_residual += gap * gap;
    }
  }
  // Sums of D fp32 squares are good to D 2^-24 relatively, and each square to 2^-149 absolutely.
  double safety = 1 + double(D) * 0x1p-23;
  norm = float(std::sqrt(wide_norm + double(D) * 0x1p-149) * safety);
  residual = float(std::sqrt(wide_residual + double(D) * 0x1p-149) * safety);
}

}  // namespace

void topk_encode_round(const RoundArgs& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(T) < 8)  // fp64 is never screened
      for (int64_t i = begin; i < end; ++i)
        round_row(static_cast<const T*>(args.rows) + (args.order ? args.order[i] : i) * args.stride, args.D,
                  args.rounded + i * args.D, args.norm[i], args.residual[i]);
  });
}

void topk_encode_widen(const WidenArgs& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = Accumulator<T>;
    for (int64_t i = begin; i < end; ++i) {
      const T* row = static_cast<const T*>(args.rows) + (args.order ? args.order[i] : i) * args.stride;
      C* widened = static_cast<C*>(args.widened) + i * args.D;
      int64_t d = 0;
      for (; d + kLanes<C> <= args.D; d += kLanes<C>) store(load(row + d), widened + d);
      for (; d < args.D; ++d) widened[d] = to_float(row[d]);
    }
  });
}

// ---- plain: exact scores ----

namespace {

template <int Count, typename T> void score_tokens(const ScoreArgs& args, const T* atom, int64_t n, int64_t m) {
  const T* tokens[Count];
  for (int i = 0; i < Count; ++i) tokens[i] = static_cast<const T*>(args.x) + (n + i) * args.x_stride;
  Accumulator<T> scores[Count];
  dots<Count>(atom, tokens, args.D, scores);
  for (int i = 0; i < Count; ++i) args.scores[(n + i) * args.count + m] = float(scores[i]);
}

}  // namespace

void topk_encode_score(const ScoreArgs& args, int64_t latent_begin, int64_t latent_end) {
  with_type(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t m = latent_begin; m < latent_end; ++m) {
      const T* atom = static_cast<const T*>(args.weight) + (args.order ? args.order[m] : m) * args.weight_stride;
      int64_t n = 0;
      for (; n + 4 <= args.N; n += 4) score_tokens<4>(args, atom, n, m);
      for (; n < args.N; ++n) score_tokens<1>(args, atom, n, m);
    }
  });
}

namespace {

template <typename C> void compact(List<C>& list, int64_t k, Candidate<C>* scratch) {
  find_best(list, k, scratch);
  for (int64_t i = 0; i < k; ++i) {
    list.first[i] = scratch[i].key;
    list.second[i] = scratch[i].score;
    list.latent[i] = scratch[i].latent;
  }
  list.count = int32_t(k);
  C last = scratch[k - 1].key;
  list.threshold = last == last ? last : kInfinity<C>;  // k times NaN: nothing but an earlier NaN could enter
}

template <typename C> void plain_row(const PlainArgs& args, int64_t n, Candidate<C>* scratch) {
  constexpr int lanes = kLanes<C>;
  const Candidates& candidates = args.candidates;
  const Stripe& stripe = args.stripe;
  const C* scores = static_cast<const C*>(args.scores) + n * stripe.count;
  auto* bias = static_cast<const C*>(stripe.bias);
  auto* scale = static_cast<const C*>(stripe.scale);
  auto score_at = [&](int64_t v) { return load_up_to(scores + v, stripe.count - v) + load(bias + v); };
  auto key_of = [&](Vector<C> score, int64_t v) {
    if (scale) score *= load(scale + v);
    return candidates.absolute ? absolute(score) : score;
  };

  List<C> list(candidates, n);
  if (stripe.begin == 0) {
    C bound = bound_by_groups<C>(candidates.k, stripe.count, [&](int64_t v) { return key_of(score_at(v), v); });
    // The bound's own latent must pass; with no bound everything, -inf too: NaN compares so.
    list.threshold = bound > -kInfinity<C> ? std::nextafter(bound, -kInfinity<C>) : C(__builtin_nan(""));
  } else if (stripe.doubled && list.count > candidates.k) {
    compact(list, candidates.k, scratch);
  }
  for (int64_t v = 0; v < stripe.count; v += lanes) {
    Vector<C> score = score_at(v), key = key_of(score, v);
    // Strictly above: a later latent loses a tie. NaN passes.
    uint32_t passing = not_at_most(key, broadcast(list.threshold)) & lanes_left(stripe.count - v, lanes);
    if (__builtin_expect(passing == 0, 1)) continue;
    list.append(key, score, stripe.begin + v, passing);
    if (list.count > candidates.capacity) compact(list, candidates.k, scratch);
  }
}

template <typename C> void plain_rows(const PlainArgs& args, int64_t row_begin, int64_t row_end) {
  std::unique_ptr<Candidate<C>[]> scratch(new Candidate<C>[args.candidates.capacity + kSlack]);
  for (int64_t n = row_begin; n < row_end; ++n) plain_row(args, n, scratch.get());
}

}  // namespace

void topk_encode_plain(const PlainArgs& args, int64_t row_begin, int64_t row_end) {
  if (args.accumulator == DType::f64) plain_rows<double>(args, row_begin, row_end);
  else plain_rows<float>(args, row_begin, row_end);
}

// ---- screen: bf16 scores in brackets ----
//
// Error bracket. With x = x~ + dx, w = w~ + dw, X = |x~|, W = |w~| and g = D 2^-24, by Cauchy-Schwarz
//   |x.w - x~.w~|               <= |dx| W + (X + |dx|) |dw|
//   the product's accumulation  <= 2 g X W, whichever way the library's threads round
//   the exact score's own       <= g (X + |dx|) (W + |dw|)
//   the product's bf16 result   <= 2^-8 |s~|
// which sums to A W + B |dw| + 2^-8 |s~| with A = |dx| (1 + g) + 3 g X and B = (X + |dx|)(1 + g). A processor that
// flushes subnormals adds at most 2^-126 a term; the bias's rounding is relative to it. Both go into `rest` and
// `residual` (edge/topk_encode.cpp). Inf and NaN in any of these widen the bracket to everything.

namespace {

inline constexpr float kSafety = 1.001f;              // for the rounding of the bracket itself
inline constexpr float kRounding = 0x1p-8f * 1.01f;   // bf16's unit roundoff

// Raises the threshold by the candidates' lower bounds and drops who can't reach it; keeps the order.
void certify_row(List<float>& list, int64_t k) {
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

// `Keyed`: keys differ from scores, by a scale or an absolute value.
template <bool Keyed> void screen_row(const ScreenArgs& args, int64_t n) {
  constexpr int lanes = kLanes<float>;
  const Candidates& candidates = args.candidates;
  const Stripe& stripe = args.stripe;
  List<float> list(candidates, n);
  if (list.count == kHopeless) return;
  float x_norm = args.x_norm[n], x_residual = args.x_residual[n];
  if (!(x_norm <= FLT_MAX && x_residual <= FLT_MAX)) {
    list.count = kHopeless;
    return;
  }
  float g = float(args.D) * 0x1p-24f;
  const Vector<float> a = broadcast(kSafety * (x_residual * (1 + g) + 3 * g * x_norm));
  const Vector<float> b = broadcast(kSafety * (x_norm + x_residual) * (1 + g));
  const bf16* scores = args.scores + n * stripe.count;
  const float *bias = static_cast<const float*>(stripe.bias), *scale = static_cast<const float*>(stripe.scale);
  const float *norm = stripe.norm, *residual = stripe.residual, *rest = stripe.rest;

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
  float most = a[0] * stripe.most_norm + (b[0] * stripe.most_residual + stripe.most_rest);

  // For the largest alone the candidates themselves will raise the threshold, once there is one.
  bool single = candidates.k == 1;
  if (stripe.begin == 0)
    list.threshold = bound_by_groups<float>(candidates.k, single ? std::min<int64_t>(stripe.count, 512) : stripe.count,
                                            [&](int64_t v) {
      Scored at = scored(v);
      return at.key - error(at, v);
    });
  else if (stripe.doubled)
    certify_row(list, candidates.k);
  for (int64_t v = 0; v < stripe.count; v += lanes) {
    Scored at = scored(v);
    uint32_t passing = not_below(at.key + at.rounding, broadcast(list.threshold - most));
    if (__builtin_expect(passing == 0, 1)) continue;
    Vector<float> gap = error(at, v), upper = at.key + gap, lower = at.key - gap;
    passing &= not_below(upper, broadcast(list.threshold)) & lanes_left(stripe.count - v, lanes);
    if (passing == 0) continue;
    lower = at_least(lower, broadcast(-kInfinity<float>));
    list.append(upper == upper ? upper : broadcast(kInfinity<float>), lower, stripe.begin + v, passing);
    if (single) list.threshold = std::max(list.threshold, largest(lower, passing));
    if (list.count > candidates.capacity) {
      certify_row(list, candidates.k);
      if (list.count > candidates.capacity / 4 * 3) {
        list.count = kHopeless;
        return;
      }
    }
  }
}

}  // namespace

void topk_encode_screen(const ScreenArgs& args, int64_t row_begin, int64_t row_end) {
  bool keyed = args.stripe.scale || args.candidates.absolute;
  for (int64_t n = row_begin; n < row_end; ++n)
    if (keyed) screen_row<true>(args, n);
    else screen_row<false>(args, n);
}

void topk_encode_certify(const Candidates& candidates, int64_t row_begin, int64_t row_end) {
  for (int64_t n = row_begin; n < row_end; ++n) {
    List<float> list(candidates, n);
    if (list.count != kHopeless) certify_row(list, candidates.k);
  }
}

// ---- refine: exact scores of the survivors ----

namespace {

struct Survivor {
  float *key, *score;
  int64_t row;
};

template <int Count, typename T>
void score(const RefineArgs& args, const T* atom, const Survivor* survivors, float bias, const float* scale) {
  const T* rows[Count];
  for (int i = 0; i < Count; ++i) rows[i] = static_cast<const T*>(args.x) + survivors[i].row * args.x_stride;
  float products[Count];
  dots<Count>(atom, rows, args.D, products);
  for (int i = 0; i < Count; ++i) {
    float exact = products[i] + bias, key = scale ? exact * *scale : exact;
    *survivors[i].key = args.candidates.absolute ? std::fabs(key) : key;
    *survivors[i].score = exact;
  }
}

}  // namespace

void topk_encode_refine(const RefineArgs& args, int64_t latent_begin, int64_t latent_end) {
  constexpr int together = 4;
  int64_t latents = latent_end - latent_begin;
  // A stable counting sort by latent. Counts are kept two places on: filling then leaves each list's begin.
  struct Offset { int64_t value; };
  std::unique_ptr<Offset[]> offsets(new Offset[latents + 2]());
  auto each_survivor = [&](auto&& visit) {
    for (int64_t n = 0; n < args.N; ++n) {
      List<float> list(args.candidates, n);
      if (list.count == kHopeless) continue;
      // A row's list is in the order of its latents.
      int32_t i = 0;
      for (int32_t rest = list.count; rest > 0;) {
        int32_t half = rest / 2;
        bool before = list.latent[i + half] < latent_begin;
        i = before ? i + half + 1 : i;
        rest = before ? rest - half - 1 : half;
      }
      for (; i < list.count && list.latent[i] < latent_end; ++i)
        visit(list.latent[i] - latent_begin, Survivor{list.first + i, list.second + i, n});
    }
  };
  each_survivor([&](int64_t latent, const Survivor&) { ++offsets[latent + 2].value; });
  for (int64_t m = 1; m <= latents; ++m) offsets[m + 1].value += offsets[m].value;
  std::unique_ptr<Survivor[]> survivors(new Survivor[offsets[latents + 1].value]);
  each_survivor([&](int64_t latent, const Survivor& survivor) {
    survivors[offsets[latent + 1].value++] = survivor;
  });

  with_type(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(T) < 8)
      for (int64_t m = 0; m < latents; ++m) {
        int64_t position = latent_begin + m, end = offsets[m + 1].value, i = offsets[m].value;
        if (i == end) continue;
        int64_t latent = args.eligible ? args.eligible[position] : position;
        const T* atom = static_cast<const T*>(args.weight) + latent * args.weight_stride;
        const float* scale = args.scale ? args.scale + position : nullptr;
        for (; i + together <= end; i += together)
          score<together>(args, atom, &survivors[i], args.bias[position], scale);
        for (; i < end; ++i) score<1>(args, atom, &survivors[i], args.bias[position], scale);
      }
  });
}

// ---- select: the k best candidates, in order ----

void topk_encode_select(const SelectArgs& args, int64_t row_begin, int64_t row_end) {
  const Candidates& candidates = args.candidates;
  with_type(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = Accumulator<T>;
    std::unique_ptr<Candidate<C>[]> best(new Candidate<C>[candidates.capacity + kSlack]);
    for (int64_t n = row_begin; n < row_end; ++n) {
      List<C> list(candidates, n);
      if (list.count == kHopeless) continue;
      find_best(list, candidates.k, best.get());
      std::sort(best.get(), best.get() + candidates.k, Better{});
      int64_t row = args.order ? args.order[n] : n;
      T* values = static_cast<T*>(args.values) + row * candidates.k;
      int64_t* indices = args.indices + row * candidates.k;
      for (int64_t j = 0; j < candidates.k; ++j) {
        C value = best[j].score;
        if (args.activation == Activation::relu && value <= 0) value = 0;
        from_float(value, values[j]);
        indices[j] = args.eligible ? args.eligible[best[j].latent] : best[j].latent;
      }
    }
  });
}

}  // namespace fastsparse::FASTSPARSE_ISA
