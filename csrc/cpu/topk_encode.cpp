#include "cpu/topk_encode.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "cpu/candidates.h"
#include "cpu/dot.h"

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

namespace {

struct Survivor {
  float *key, *score;
  int64_t row;
};

template <int Count, typename T>
void score(const Rows& x, const T* atom, const Survivor* survivors, float bias, const float* scale, bool absolute) {
  const T* rows[Count];
  for (int i = 0; i < Count; ++i) rows[i] = static_cast<const T*>(x.data) + survivors[i].row * x.stride;
  float products[Count];
  dots<Count>(atom, rows, x.D, products);
  for (int i = 0; i < Count; ++i) {
    float exact = products[i] + bias, key = scale ? exact * *scale : exact;
    *survivors[i].key = absolute ? std::fabs(key) : key;
    *survivors[i].score = exact;
  }
}

}  // namespace

void topk_encode_refine(const Candidates& candidates, const RefineArgs& args, int64_t latent_begin, int64_t latent_end) {
  constexpr int together = 4;
  int64_t latents = latent_end - latent_begin;
  // A stable counting sort by latent. Counts are kept two places on: filling then leaves each list's begin.
  struct Offset { int64_t value; };
  std::unique_ptr<Offset[]> offsets(new Offset[latents + 2]());
  auto each_survivor = [&](auto&& visit) {
    for (int64_t n = 0; n < args.N; ++n) {
      List<float> list(candidates, n);
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

  with_type(args.x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(T) < 8)
      for (int64_t m = 0; m < latents; ++m) {
        int64_t position = latent_begin + m, end = offsets[m + 1].value, i = offsets[m].value;
        if (i == end) continue;
        int64_t latent = args.weight.order ? args.weight.order[position] : position;
        const T* atom = static_cast<const T*>(args.weight.data) + latent * args.weight.stride;
        const float *bias = args.bias + position, *scale = args.scale ? args.scale + position : nullptr;
        for (; i + together <= end; i += together)
          score<together>(args.x, atom, &survivors[i], *bias, scale, candidates.absolute);
        for (; i < end; ++i) score<1>(args.x, atom, &survivors[i], *bias, scale, candidates.absolute);
      }
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
