#include "cpu/topk_encode.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "cpu/candidates.h"
#include "cpu/refine.h"

namespace fastsparse::FASTSPARSE_ISA {

namespace {

// The k best of a list, in no order, at the front of `scratch`.
template <typename C> void find_best(const List<C>& list, int64_t k, Candidate<C>* scratch) {
  for (int32_t i = 0; i < list.count; ++i) scratch[i] = {list.first[i], list.second[i], list.latent[i]};
  if (list.count > k) std::nth_element(scratch, scratch + k - 1, scratch + list.count, Better{});
}

// Keeps the k largest: a row's threshold is the k-th best of what it has seen.
template <typename C> struct Largest {
  int64_t k;
  Candidate<C>* scratch;

  template <typename Keys> void begin(List<C>& list, int64_t count, const Keys& keys) const {
    C bound = bound_by_groups<C>(k, count, keys);
    // The bound's own latent must pass; with no bound everything, -inf too: NaN compares so.
    list.threshold = bound > -kInfinity<C> ? std::nextafter(bound, -kInfinity<C>) : C(__builtin_nan(""));
  }
  void raise(List<C>& list) const {
    if (list.count <= k) return;
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
};

template <typename C> void filter(const Candidates& candidates, const Stripe& stripe, int64_t begin, int64_t end) {
  std::unique_ptr<Candidate<C>[]> scratch(new Candidate<C>[candidates.capacity + kSlack]);
  for (int64_t n = begin; n < end; ++n) filter_row(Largest<C>{candidates.k, scratch.get()}, candidates, stripe, n);
}

}  // namespace

void topk_encode_filter(const Candidates& candidates, const Stripe& stripe, int64_t row_begin, int64_t row_end) {
  if (candidates.dtype == DType::f64) filter<double>(candidates, stripe, row_begin, row_end);
  else filter<float>(candidates, stripe, row_begin, row_end);
}

// ---- refine: exact scores of the survivors ----

void topk_encode_refine(const Candidates& candidates, const RefineArgs& args, int64_t latent_begin, int64_t latent_end) {
  auto survivors_of = [&](int64_t n) {
    List<float> list(candidates, n);
    return Survivors{list.latent, list.count == kHopeless ? 0 : list.count};
  };
  refine(args, survivors_of, latent_begin, latent_end, [&](int64_t n, int64_t i, float score) {
    List<float> list(candidates, n);
    float key = args.scale ? score * args.scale[list.latent[i]] : score;
    list.first[i] = candidates.absolute ? std::fabs(key) : key;
    list.second[i] = score;
  });
}

// ---- select: the k best candidates, in order ----

void topk_encode_select(const Candidates& candidates, const SelectArgs& args, int64_t row_begin, int64_t row_end) {
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
      T* values = static_cast<T*>(args.values) + row * args.stride;
      int64_t* indices = args.indices + row * args.stride;
      for (int64_t j = 0; j < candidates.k; ++j) {
        C value = best[j].score;
        if (args.activation == Activation::relu && value <= 0) value = 0;
        from_float(value, values[j]);
        indices[j] = args.first + (args.eligible ? args.eligible[best[j].latent] : best[j].latent);
      }
    }
  });
}

}  // namespace fastsparse::FASTSPARSE_ISA
