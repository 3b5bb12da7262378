#include "cpu/topk_encode.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <memory>

#include "cpu/dot.h"

namespace fastsparse::FASTSPARSE_ISA {

namespace {

template <typename C> struct Candidate {
  C first, second;  // key and score; in a screen upper and lower bound of the key
  int32_t latent;
};
static_assert(sizeof(Candidate<float>) == candidate_bytes(false));
static_assert(sizeof(Candidate<double>) == candidate_bytes(true));

template <typename C> inline constexpr C kInfinity = __builtin_inf();

template <typename C> Candidate<C>* row_buffer(const Candidates& candidates, int64_t n) {
  return static_cast<Candidate<C>*>(candidates.buffer) + n * (candidates.capacity + kSlack);
}

// The order of the result: larger key first, NaN before all, ties to the lower latent.
struct Better {
  template <typename C> bool operator()(const Candidate<C>& a, const Candidate<C>& b) const {
    if (a.first > b.first) return true;
    if (a.first < b.first) return false;
    bool a_nan = a.first != a.first, b_nan = b.first != b.first;
    return a_nan != b_nan ? a_nan : a.latent < b.latent;
  }
};

struct HigherFloor {
  bool operator()(const Candidate<float>& a, const Candidate<float>& b) const { return a.second > b.second; }
};

template <typename C> struct Bound { C value; };
struct HigherBound {
  template <typename C> bool operator()(const Bound<C>& a, const Bound<C>& b) const { return a.value > b.value; }
};

uint32_t lanes_left(int64_t left, int lanes) { return left >= lanes ? ~0u : (1u << left) - 1; }

// A lower bound on the row's k-th largest key before any candidate is known: with the stripe's latents dealt into
// groups, the k-th largest of the groups' maxima. `keys(v)` gives the vector of lower bounds at latent v.
template <typename C, typename Keys> C bound_by_groups(int64_t k, int64_t count, const Keys& keys) {
  constexpr int lanes = kLanes<C>;
  constexpr int64_t most = 1024;
  int64_t groups = (2 * k + lanes - 1) / lanes * lanes;
  if (groups > most || count < 2 * groups) return -kInfinity<C>;
  Bound<C> maxima[most];
  C* maximum = &maxima[0].value;
  for (int64_t g = 0; g < groups; ++g) maximum[g] = -kInfinity<C>;
  int64_t g = 0;
  for (int64_t v = 0; v + lanes <= count; v += lanes) {
    store(at_least(keys(v), load(maximum + g)), maximum + g);
    if ((g += lanes) == groups) g = 0;
  }
  std::nth_element(maxima, maxima + k - 1, maxima + groups, HigherBound{});
  return maxima[k - 1].value;
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

template <typename C> void compact(Candidate<C>* buffer, int64_t k, int32_t& count, C& threshold) {
  std::nth_element(buffer, buffer + k - 1, buffer + count, Better{});
  count = int32_t(k);
  C last = buffer[k - 1].first;
  threshold = last == last ? last : kInfinity<C>;  // k times NaN: nothing but an earlier NaN could enter
}

template <typename C> void plain_row(const PlainArgs& args, int64_t n) {
  constexpr int lanes = kLanes<C>;
  const Candidates& candidates = args.candidates;
  const Stripe& stripe = args.stripe;
  const C* scores = static_cast<const C*>(args.scores) + n * stripe.score_stride;
  auto* bias = static_cast<const C*>(stripe.bias);
  auto* scale = static_cast<const C*>(stripe.scale);
  auto score_at = [&](int64_t v) { return load_up_to(scores + v, stripe.count - v) + load(bias + v); };
  auto key_of = [&](Vector<C> score, int64_t v) {
    if (scale) score *= load(scale + v);
    return candidates.absolute ? absolute(score) : score;
  };

  Candidate<C>* buffer = row_buffer<C>(candidates, n);
  int32_t count = candidates.count[n];
  C threshold = static_cast<C*>(candidates.threshold)[n];
  if (stripe.begin == 0) {
    C bound = bound_by_groups<C>(candidates.k, stripe.count, [&](int64_t v) { return key_of(score_at(v), v); });
    // The bound's own latent must pass; with no bound everything, -inf too: NaN compares so.
    threshold = bound > -kInfinity<C> ? std::nextafter(bound, -kInfinity<C>) : C(__builtin_nan(""));
  } else if (stripe.doubled && count > candidates.k) {
    compact(buffer, candidates.k, count, threshold);
  }
  for (int64_t v = 0; v < stripe.count; v += lanes) {
    Vector<C> score = score_at(v), key = key_of(score, v);
    // Strictly above: a later latent loses a tie. NaN passes.
    uint32_t passing = not_at_most(key, broadcast(threshold)) & lanes_left(stripe.count - v, lanes);
    if (__builtin_expect(passing == 0, 1)) continue;
    for (; passing; passing &= passing - 1) {
      int lane = __builtin_ctz(passing);
      buffer[count++] = {key[lane], score[lane], int32_t(stripe.begin + v + lane)};
    }
    if (count > candidates.capacity) compact(buffer, candidates.k, count, threshold);
  }
  candidates.count[n] = count;
  static_cast<C*>(candidates.threshold)[n] = threshold;
}

}  // namespace

void topk_encode_plain(const PlainArgs& args, int64_t row_begin, int64_t row_end) {
  for (int64_t n = row_begin; n < row_end; ++n)
    if (args.accumulator == DType::f64) plain_row<double>(args, n);
    else plain_row<float>(args, n);
}

// ---- screen: bf16 scores in brackets ----
//
// Error bracket. With x = x~ + dx, w = w~ + dw, X = |x~|, W = |w~| and g = D 2^-24, by Cauchy-Schwarz
//   |x.w - x~.w~|               <= |dx| W + (X + |dx|) |dw|
//   the product's accumulation  <= g X W
//   the exact score's own       <= g (X + |dx|) (W + |dw|)
//   the product's bf16 result   <= 2^-8 |s~|
// which sums to A W + B |dw| + 2^-8 |s~| with A = |dx| (1 + g) + 2 g X and B = (X + |dx|)(1 + g). A processor that
// flushes subnormals adds at most 2^-126 a term; the bias's rounding is relative to it. Both go into `rest` and
// `residual` (edge/topk_encode.cpp). Inf and NaN in any of these widen the bracket to everything.

namespace {

inline constexpr float kSafety = 1.001f;              // for the rounding of the bracket itself
inline constexpr float kRounding = 0x1p-8f * 1.01f;   // bf16's unit roundoff

// Raises the threshold to the k-th largest lower bound and drops who can't reach it.
void certify_row(const Candidates& candidates, int64_t n) {
  int32_t& count = candidates.count[n];
  Candidate<float>* buffer = row_buffer<float>(candidates, n);
  float& threshold = static_cast<float*>(candidates.threshold)[n];
  if (count > candidates.k) {
    std::nth_element(buffer, buffer + candidates.k - 1, buffer + count, HigherFloor{});
    threshold = buffer[candidates.k - 1].second > threshold ? buffer[candidates.k - 1].second : threshold;
  }
  int32_t kept = 0;
  for (int32_t i = 0; i < count; ++i)
    if (buffer[i].first >= threshold) buffer[kept++] = buffer[i];
  count = kept;
}

// `Keyed`: keys differ from scores, by a scale or an absolute value.
template <bool Keyed> void screen_row(const ScreenArgs& args, int64_t n) {
  constexpr int lanes = kLanes<float>;
  const Candidates& candidates = args.candidates;
  const Stripe& stripe = args.stripe;
  int32_t& count = candidates.count[n];
  if (count == kHopeless) return;
  float x_norm = args.x_norm[n], x_residual = args.x_residual[n];
  if (!(x_norm <= FLT_MAX && x_residual <= FLT_MAX)) {
    count = kHopeless;
    return;
  }
  float g = float(args.D) * 0x1p-24f;
  const Vector<float> a = broadcast(kSafety * (x_residual * (1 + g) + 2 * g * x_norm));
  const Vector<float> b = broadcast(kSafety * (x_norm + x_residual) * (1 + g));
  const bf16* scores = args.scores + n * stripe.score_stride;
  const float *bias = static_cast<const float*>(stripe.bias), *scale = static_cast<const float*>(stripe.scale);
  const float *norm = stripe.norm, *residual = stripe.residual, *rest = stripe.rest;

  struct Bracket { Vector<float> key, error; };
  auto bracket = [&](int64_t v) __attribute__((always_inline)) {
    Vector<float> score = load_up_to(scores + v, stripe.count - v), key = score + load(bias + v);
    if constexpr (Keyed) {
      if (scale) {
        Vector<float> factor = load(scale + v);
        score *= factor;
        key *= factor;
      }
      if (candidates.absolute) key = absolute(key);
    }
    return Bracket{key, a * load(norm + v) + (b * load(residual + v) + load(rest + v)) +
                            broadcast(kRounding) * absolute(score)};
  };

  Candidate<float>* buffer = row_buffer<float>(candidates, n);
  float& threshold = static_cast<float*>(candidates.threshold)[n];
  if (stripe.begin == 0)
    threshold = bound_by_groups<float>(candidates.k, stripe.count, [&](int64_t v) {
      Bracket bounds = bracket(v);
      return bounds.key - bounds.error;
    });
  else if (stripe.doubled) certify_row(candidates, n);
  for (int64_t v = 0; v < stripe.count; v += lanes) {
    Bracket bounds = bracket(v);
    uint32_t passing = not_below(bounds.key + bounds.error, broadcast(threshold)) & lanes_left(stripe.count - v, lanes);
    if (__builtin_expect(passing == 0, 1)) continue;
    for (; passing; passing &= passing - 1) {
      int lane = __builtin_ctz(passing);
      float upper = bounds.key[lane] + bounds.error[lane], lower = bounds.key[lane] - bounds.error[lane];
      buffer[count++] = {upper == upper ? upper : kInfinity<float>, lower == lower ? lower : -kInfinity<float>,
                         int32_t(stripe.begin + v + lane)};
    }
    if (count > candidates.capacity) {
      certify_row(candidates, n);
      if (count > candidates.capacity / 4 * 3) {
        count = kHopeless;
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
  for (int64_t n = row_begin; n < row_end; ++n)
    if (candidates.count[n] != kHopeless) certify_row(candidates, n);
}

// ---- refine: exact scores of the survivors ----

namespace {

struct Survivor {
  Candidate<float>* candidate;
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
    survivors[i].candidate->first = args.candidates.absolute ? std::fabs(key) : key;
    survivors[i].candidate->second = exact;
  }
}

}  // namespace

void topk_encode_refine(const RefineArgs& args, int64_t latent_begin, int64_t latent_end) {
  constexpr int together = 4;
  int64_t latents = latent_end - latent_begin;
  // A stable counting sort by latent. Counts are kept two places on: filling then leaves each list's begin.
  std::unique_ptr<int64_t[]> offsets(new int64_t[latents + 2]());
  auto each_survivor = [&](auto&& visit) {
    for (int64_t n = 0; n < args.N; ++n) {
      Candidate<float>* buffer = row_buffer<float>(args.candidates, n);
      for (int32_t i = 0; i < args.candidates.count[n]; ++i) {
        int64_t latent = buffer[i].latent - latent_begin;
        if (latent >= 0 && latent < latents) visit(latent, buffer + i, n);
      }
    }
  };
  each_survivor([&](int64_t latent, Candidate<float>*, int64_t) { ++offsets[latent + 2]; });
  for (int64_t m = 1; m <= latents; ++m) offsets[m + 1] += offsets[m];
  int64_t total = offsets[latents + 1];
  std::unique_ptr<Survivor[]> survivors(new Survivor[total]);
  each_survivor([&](int64_t latent, Candidate<float>* candidate, int64_t n) {
    survivors[offsets[latent + 1]++] = {candidate, n};
  });

  with_type(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(T) < 8)
      for (int64_t m = 0; m < latents; ++m) {
        int64_t position = latent_begin + m, end = offsets[m + 1], i = offsets[m];
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
    for (int64_t n = row_begin; n < row_end; ++n) {
      if (candidates.count[n] == kHopeless) continue;
      Candidate<C>* buffer = row_buffer<C>(candidates, n);
      if (candidates.count[n] > candidates.k)
        std::nth_element(buffer, buffer + candidates.k - 1, buffer + candidates.count[n], Better{});
      std::sort(buffer, buffer + candidates.k, Better{});
      int64_t row = args.order ? args.order[n] : n;
      T* values = static_cast<T*>(args.values) + row * candidates.k;
      int64_t* indices = args.indices + row * candidates.k;
      for (int64_t j = 0; j < candidates.k; ++j) {
        C value = buffer[j].second;
        if (args.activation == Activation::relu && value <= 0) value = 0;
        from_float(value, values[j]);
        indices[j] = args.eligible ? args.eligible[buffer[j].latent] : buffer[j].latent;
      }
    }
  });
}

}  // namespace fastsparse::FASTSPARSE_ISA
