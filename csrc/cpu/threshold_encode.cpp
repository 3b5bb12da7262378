#include "cpu/threshold_encode.h"

#include <cmath>
#include <type_traits>

#include "cpu/bracket.h"
#include "cpu/candidates.h"
#include "cpu/refine.h"

namespace fastsparse::FASTSPARSE_ISA {

namespace {

// Calls visit(v, scores, lanes) where lanes of the vector of a row's scores at latent v are above their bounds.
template <typename C, typename Visit>
void above(const Stripe& stripe, const Bounds& bounds, int64_t n, const Visit& visit) {
  constexpr int lanes = kLanes<C>;
  const C *scores = static_cast<const C*>(stripe.scores) + n * stripe.count, *bias = static_cast<const C*>(stripe.bias),
          *bound = static_cast<const C*>(bounds.values);
  for (int64_t v = 0; v < stripe.count; v += lanes) {
    Vector<C> score = load_up_to(scores + v, stripe.count - v) + load(bias + v);
    Vector<C> key = bounds.absolute ? absolute(score) : score;
    uint32_t passing = not_at_most(key, load(bound + v)) & lanes_left(stripe.count - v, lanes);  // NaN passes
    if (passing) visit(v, score, passing);
  }
}

// The same of a screen's scores that may be.
template <bool Absolute, typename Visit>
void may_be_above(const Stripe& stripe, const Bounds& bounds, int64_t n, const Visit& visit) {
  constexpr int lanes = kLanes<float>;
  const Bracketed<Absolute> scores(stripe, Absolute, n);
  const auto* bound = static_cast<const float*>(bounds.values);
  const Vector<float> most = broadcast(scores.most_error()), infinite = broadcast(FLT_MAX);
  for (int64_t v = 0; v < stripe.count; v += lanes) {
    auto at = scores.at(v);
    Vector<float> beyond = load(bound + v);
    beyond = beyond > infinite ? infinite : beyond;  // what may be NaN is above infinity too
    if (__builtin_expect(not_at_most(at.key + at.rounding + most, beyond) == 0, 1)) continue;
    Vector<float> upper = at.key + scores.error(at, v);
    if (uint32_t passing = not_at_most(upper, beyond) & lanes_left(stripe.count - v, lanes)) visit(v, upper, passing);
  }
}

template <typename Visit>
void visit_row(const Stripe& stripe, const Bounds& bounds, int64_t n, const Visit& visit) {
  if (bounds.dtype == DType::f64) above<double>(stripe, bounds, n, visit);
  else if (!stripe.x_norm) above<float>(stripe, bounds, n, visit);
  else if (bounds.absolute) may_be_above<true>(stripe, bounds, n, visit);
  else may_be_above<false>(stripe, bounds, n, visit);
}

}  // namespace

void threshold_encode_count(const Stripe& stripe, const Bounds& bounds, const Listed& listed, int64_t row_begin,
                            int64_t row_end) {
  for (int64_t n = row_begin; n < row_end; ++n) {
    int64_t count = 0;
    visit_row(stripe, bounds, n, [&](int64_t, auto, uint32_t passing) { count += __builtin_popcount(passing); });
    listed.counts[n] = count;
  }
}

void threshold_encode_list(const Stripe& stripe, const Bounds& bounds, const Listed& listed, int64_t row_begin,
                           int64_t row_end) {
  constexpr int64_t overwritten = 16;  // by compress, of the smaller type
  for (int64_t n = row_begin; n < row_end; ++n) {
    int64_t place = listed.offsets[n], end = listed.offsets[n + 1];
    visit_row(stripe, bounds, n, [&](int64_t v, auto score, uint32_t passing) {
      using C = std::decay_t<decltype(score[0])>;
      C* scores = static_cast<C*>(listed.scores);
      if (end - place >= overwritten) {
        compress(score, passing, scores + place);
        compress_consecutive(int32_t(v), passing, listed.latents + place);
        place += __builtin_popcount(passing);
        return;
      }
      for (; passing; passing &= passing - 1, ++place) {  // the next row's entries may be there already
        int lane = __builtin_ctz(passing);
        scores[place] = score[lane];
        listed.latents[place] = int32_t(v + lane);
      }
    });
  }
}

void threshold_encode_refine(const Listed& listed, const RefineArgs& args, int64_t latent_begin, int64_t latent_end) {
  auto survivors_of = [&](int64_t n) { return Survivors{listed.latents + listed.offsets[n], listed.counts[n]}; };
  auto* scores = static_cast<float*>(listed.scores);
  refine(args, survivors_of, latent_begin, latent_end,
         [&](int64_t n, int64_t i, float score) { scores[listed.offsets[n] + i] = score; });
}

void threshold_encode_keep(const Bounds& bounds, const Listed& listed, int64_t row_begin, int64_t row_end) {
  const auto* bound = static_cast<const float*>(bounds.values);
  for (int64_t n = row_begin; n < row_end; ++n) {
    float* scores = static_cast<float*>(listed.scores) + listed.offsets[n];
    int32_t* latents = listed.latents + listed.offsets[n];
    int64_t kept = 0;
    for (int64_t i = 0; i < listed.counts[n]; ++i) {
      float score = scores[i];
      int32_t latent = latents[i];
      scores[kept] = score;
      latents[kept] = latent;
      kept += !((bounds.absolute ? std::fabs(score) : score) <= bound[latent]);
    }
    listed.counts[n] = kept;
  }
}

}  // namespace fastsparse::FASTSPARSE_ISA
