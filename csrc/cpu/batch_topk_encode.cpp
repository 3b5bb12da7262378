#include "cpu/batch_topk_encode.h"

#include <algorithm>
#include <cmath>

#include "cpu/refine.h"
#include "cpu/screen_row.h"

namespace fastsparse::FASTSPARSE_ISA {

namespace {

template <typename C> struct Entry {
  C key, score;  // or upper and lower bound
  int32_t row, latent;
};

// The order of the batch: larger key first, NaN before all, ties to the lower row and then to the lower latent.
struct Before {
  template <typename C> bool operator()(const Entry<C>& a, const Entry<C>& b) const {
    if (a.key > b.key) return true;
    if (a.key < b.key) return false;
    bool a_nan = a.key != a.key, b_nan = b.key != b.key;
    if (a_nan != b_nan) return a_nan;
    return a.row != b.row ? a.row < b.row : a.latent < b.latent;
  }
};

template <typename C> Entry<C>* entries_of(const Pool& pool) { return static_cast<Entry<C>*>(pool.entries); }

template <typename C> void keep_largest(Pool& pool) {
  if (pool.count < pool.total) return;
  Entry<C>*entries = entries_of<C>(pool), *last = entries + pool.total - 1;
  std::nth_element(entries, last, entries + pool.count, Before{});
  pool.count = pool.total;
  pool.bounded = true;
  pool.bound = last->key;
  pool.bound_row = last->row;
}

// Raises the bound by the lower bounds and drops who can't reach it.
void keep_possible(Pool& pool) {
  if (pool.count <= pool.total) return;
  auto* entries = entries_of<float>(pool);
  for (int64_t i = 0; i < pool.count; ++i) pool.lower[i] = entries[i].score;
  float bound = bound_by_bisection(pool.lower, pool.count, pool.total);
  pool.bound = pool.bounded ? std::max<double>(pool.bound, bound) : bound;
  pool.bounded = true;
  int64_t kept = 0;
  for (int64_t i = 0; i < pool.count; ++i)
    if (entries[i].key >= pool.bound) entries[kept++] = entries[i];
  pool.count = kept;
}

template <typename C> void compact(Pool& pool) {
  if (pool.bracketed) keep_possible(pool);
  else keep_largest<C>(pool);
}

// What a row's scores must exceed, or its upper bounds reach: NaN compares as if there were no bound.
template <typename C> C threshold_of(const Pool& pool, int64_t row) {
  constexpr C nothing = C(__builtin_nan(""));
  C bound = C(pool.bound);
  if (pool.bracketed) return pool.hopeless ? kInfinity<C> : pool.bounded ? bound : -kInfinity<C>;
  if (!pool.bounded) return nothing;
  if (bound != bound) return kInfinity<C>;  // `total` times NaN: nothing but an earlier NaN could enter
  if (row > pool.bound_row) return bound;   // and a later row loses a tie
  return bound > -kInfinity<C> ? std::nextafter(bound, -kInfinity<C>) : nothing;
}

// Moves row n's list into the pool; its threshold follows the pool's bound.
template <typename C> void hand_over(Pool& pool, List<C>& list, int64_t n) {
  int64_t row = pool.order ? pool.order[n] : pool.first_row + n;
  pthread_mutex_lock(&pool.mutex);
  for (int32_t i = 0; i < list.count && !pool.hopeless; ++i) {
    if (pool.count == pool.capacity) {
      compact<C>(pool);
      pool.hopeless = pool.bracketed && pool.count > pool.capacity / 4 * 3;
      if (pool.hopeless) break;
    }
    entries_of<C>(pool)[pool.count++] = {list.first[i], list.second[i], int32_t(row), list.latent[i]};
  }
  list.threshold = threshold_of<C>(pool, row);
  pthread_mutex_unlock(&pool.mutex);
  list.count = 0;
}

// A filter as those of filter_row and screen_row: the row's list is only on its way.
template <typename C> struct Pooled {
  Pool& pool;
  int64_t n;

  template <typename Keys> void begin(List<C>&, int64_t, const Keys&) const {}
  void raise(List<C>& list) const { hand_over(pool, list, n); }
  void add(List<C>&, Vector<C>, uint32_t) const {}
};

template <typename C, typename Take>
void take_rows(Pool& pool, const Candidates& candidates, int64_t begin, int64_t end, const Take& take) {
  for (int64_t n = begin; n < end; ++n) {
    List<C> list(candidates, n);
    if (list.count == kHopeless) continue;
    hand_over(pool, list, n);  // for the threshold: the list is empty
    take(Pooled<C>{pool, n}, n);
    if (list.count != kHopeless) hand_over(pool, list, n);
  }
}

}  // namespace

void batch_topk_encode_filter(Pool* pool, const Candidates& candidates, const Stripe& stripe, int64_t row_begin,
                              int64_t row_end) {
  auto take = [&](auto filter, int64_t n) { filter_row(filter, candidates, stripe, n); };
  if (pool->dtype == DType::f64) take_rows<double>(*pool, candidates, row_begin, row_end, take);
  else take_rows<float>(*pool, candidates, row_begin, row_end, take);
}

void batch_topk_encode_screen(Pool* pool, const Candidates& candidates, const Stripe& stripe, int64_t row_begin,
                              int64_t row_end) {
  bool keyed = stripe.scale || candidates.absolute;
  take_rows<float>(*pool, candidates, row_begin, row_end, [&](const auto& filter, int64_t n) {
    if (keyed) screen_row<true>(filter, candidates, stripe, n);
    else screen_row<false>(filter, candidates, stripe, n);
  });
}

void batch_topk_encode_compact(Pool* pool) {
  if (pool->dtype == DType::f64) compact<double>(*pool);
  else compact<float>(*pool);
}

void batch_topk_encode_refine(Pool* pool, const RefineArgs& args, bool absolute, int64_t latent_begin,
                              int64_t latent_end) {
  auto* entries = entries_of<float>(*pool);
  auto each = [&](auto&& visit) {
    for (int64_t i = 0; i < pool->count; ++i)
      if (entries[i].latent >= latent_begin && entries[i].latent < latent_end)
        visit(entries[i].latent, Survivor{entries[i].row, i});
  };
  refine_each(args, latent_begin, latent_end, each, [&](int64_t, int64_t i, float score) {
    float key = args.scale ? score * args.scale[entries[i].latent] : score;
    entries[i].key = absolute ? std::fabs(key) : key;
    entries[i].score = score;
  });
}

// ---- the result: by rows, and by latents within them ----

void batch_topk_encode_arrange(Pool* pool, const ArrangeArgs& args) {
  auto arrange = [&](auto number) {
    using C = decltype(number);
    keep_largest<C>(*pool);
    *static_cast<C*>(args.threshold) = C(pool->bound);
    const Entry<C>* entries = entries_of<C>(*pool);
    auto* sorted = static_cast<Entry<C>*>(args.sorted);
    // A counting sort. Counts are kept a place on, so that filling leaves each row's end, and the first offset is 0.
    for (int64_t n = 0; n <= args.N; ++n) args.offsets[n] = 0;
    for (int64_t i = 0; i < pool->total; ++i) ++args.offsets[entries[i].row + 1];
    for (int64_t n = 1, before = 0; n <= args.N; ++n) {
      int64_t count = args.offsets[n];
      args.offsets[n] = before;
      before += count;
    }
    for (int64_t i = 0; i < pool->total; ++i) sorted[args.offsets[entries[i].row + 1]++] = entries[i];
  };
  if (pool->dtype == DType::f64) arrange(0.0);
  else arrange(0.0f);
}

void batch_topk_encode_write(const ArrangeArgs& args, int64_t row_begin, int64_t row_end) {
  with_type(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = Accumulator<T>;
    auto* sorted = static_cast<Entry<C>*>(args.sorted);
    for (int64_t n = row_begin; n < row_end; ++n) {
      int64_t begin = args.offsets[n], end = args.offsets[n + 1];
      std::sort(sorted + begin, sorted + end, [](const Entry<C>& a, const Entry<C>& b) { return a.latent < b.latent; });
      for (int64_t i = begin; i < end; ++i) {
        C value = sorted[i].score;
        if (args.activation == Activation::relu && value <= 0) value = 0;
        from_float(value, static_cast<T*>(args.values)[i]);
        args.indices[i] = args.eligible ? args.eligible[sorted[i].latent] : sorted[i].latent;
      }
    }
  });
}

}  // namespace fastsparse::FASTSPARSE_ISA
