// The `total` largest of x @ weight.T + bias among all rows, on the device: one pool for the whole batch.
//
// The vendor's library multiplies a block of rows (tokens) with a stripe of latents; its scores, 32 MB of them, stay in
// the L2 cache. A warp a row reads them once and appends to the pool what reaches its bound. Only where that is more
// than there is room for are the digits counted of all that may be among the largest, in pool and stripe, from the
// highest digit on, until it is known from which rank on there are `total`: these move to the other half of the pool,
// and that rank is the new bound. It is the host that launches all this after every stripe, since nobody waits for the
// device; what isn't needed ends at once. Who comes into the pool first is chance, who stays isn't: no two ranks are
// equal, and in the end places are sorted.
//
// Bytes and floor on an H200, of N=8192, D=4096, M=131072, k=32 in bf16: the product is 8.8 TFLOP, 11.2 ms at 790
// TFLOP/s; reading N M 4 = 4.3 GB of scores from L2 is 0.7 ms at some 6 TB/s. With room for `total` more, the bound is
// raised about log2(N M / stripe) + 1 = 8 times, each in 7 readings of 32 MB of scores and 8 MB of the pool, .05 ms. That
// leaves 8 launches a stripe that find nothing to do, 1,024 of them: about 2 ms, less in a CUDA graph.
#pragma once

#include <type_traits>

#include "cuda/topk_encode.cuh"

namespace fastsparse::cuda {

inline constexpr int kDigitBits = 11, kDigitValues = 1 << kDigitBits;
inline constexpr int kPoolThreads = 256;

// What is chosen by, larger first; never the same of two entries.
template <typename C> struct Rank {
  Order<C> order;      // of the key
  uint64_t earliness;  // N M - 1 - (n M + m)

  __device__ __forceinline__ bool reaches(const Rank& bound) const {
    return order > bound.order || (order == bound.order && earliness >= bound.earliness);
  }
};

// Ranks as digits, the highest first: those of the order, then those of the earliness. The last digit of each may begin
// with bits that the one before it ends with, which changes nothing.
template <typename C> struct Digits {
  static constexpr int order_bits = 8 * int(sizeof(C)), orders = (order_bits + kDigitBits - 1) / kDigitBits;
  int place_bits;

  __host__ __device__ __forceinline__ int count() const {
    return orders + (place_bits + kDigitBits - 1) / kDigitBits;
  }
  // Bits below a digit, of the part of the rank that it belongs to.
  __device__ __forceinline__ int below(int digit) const {
    int bits = digit < orders ? order_bits - (digit + 1) * kDigitBits : place_bits - (digit - orders + 1) * kDigitBits;
    return Most()(bits, 0);
  }
  __device__ __forceinline__ int value(const Rank<C>& rank, int digit) const {
    uint64_t part = digit < orders ? uint64_t(rank.order) : rank.earliness;
    return int(part >> below(digit)) & (kDigitValues - 1);
  }
  __device__ __forceinline__ void set(Rank<C>& rank, int digit, int value) const {
    if (digit < orders) rank.order |= Order<C>(value) << below(digit);
    else rank.earliness |= uint64_t(value) << below(digit);
  }
  // Whether two ranks have the same digits before this one.
  __device__ __forceinline__ bool same_before(const Rank<C>& a, const Rank<C>& b, int digit) const {
    if (digit == 0) return true;
    if (digit <= orders && a.order >> below(digit - 1) != b.order >> below(digit - 1)) return false;
    if (digit <= orders) return true;
    return a.order == b.order && a.earliness >> below(digit - 1) == b.earliness >> below(digit - 1);
  }
};

// The entries so far, in one of two halves.
template <typename C> struct Pool {
  int64_t total, capacity;
  Order<C>* order;      // (2, capacity)
  uint64_t* earliness;  // (2, capacity)
  C* score;             // (2, capacity)

  __device__ __forceinline__ Rank<C> rank(int64_t at) const { return {order[at], earliness[at]}; }
  __device__ __forceinline__ void put(int64_t at, const Rank<C>& rank, C its) const {
    order[at] = rank.order;
    earliness[at] = rank.earliness;
    score[at] = its;
  }
};

// The pool before a stripe, and what the stripe brings.
template <typename C> struct Step {
  Rank<C> bound;
  int64_t count;
  int half;
  unsigned long long appended, kept;

  __device__ __forceinline__ bool overflows(int64_t limit) const { return count + int64_t(appended) > limit; }
};

// What is known of the rank from which on `total` are kept: its digits so far, zeros behind them.
template <typename C> struct Choice {
  Rank<C> bound;
  int64_t wanted;  // of those that have these digits
  bool settled;    // that is all of them
};

// The digits' counts, and what follows from them.
template <typename C> struct Search {
  Digits<C> digits;
  Choice<C>* choices;          // (digits + 1): before each of them
  unsigned long long* counts;  // (digits, kDigitValues)
};

struct DigitStorage {
  unsigned count[kDigitValues];
  unsigned long long above[kPoolThreads];
  int value;
  int64_t wanted;
  bool settled;
};

// ---- a stripe ----

// Its scores, of rows from `first` on, and what they belong to.
template <typename C> struct Scores {
  Stripe<C> stripe;
  Latents<C> latents;
  int64_t first, N, M;
  int rows, splits;

  __device__ __forceinline__ uint64_t earliness(int64_t row, int m) const {
    return uint64_t(N * M - 1 - ((first + row) * M + m));
  }
};

// The pool as the list of one row, for `scan`.
template <typename C> struct PoolList {
  const Pool<C>& pool;
  const Scores<C>& scores;
  Step<C>* now;
  Rank<C> bound;
  int64_t row, begin, room;  // where there is room, and how much
  Order<C> threshold;        // what isn't above it doesn't reach the bound
};

// As that of a list. False: there is no room.
template <typename C, typename Row>
__device__ __forceinline__ bool append(const Row& row, PoolList<C>& list, int group, int from) {
  constexpr int size = Packet<C>::size;
  int v = group + lane_index() * size, total = 0;
  Offers<C> offers = row.offers(v);
  unsigned passing[size];
#pragma unroll
  for (int e = 0; e < size; ++e) {
    Rank<C> rank{offers.first[e], list.scores.earliness(list.row, from + v + e)};
    passing[e] = __ballot_sync(kAllLanes, rank.order != 0 && rank.reaches(list.bound));
    total += __popc(passing[e]);
  }
  if (total == 0) return true;
  int64_t to = 0;
  if (lane_index() == 0) to = int64_t(atomicAdd(&list.now->appended, (unsigned long long)(total)));
  to = __shfl_sync(kAllLanes, to, 0);
  if (to + total > list.room) return false;
#pragma unroll
  for (int e = 0; e < size; ++e) {
    if (passing[e] >> lane_index() & 1)
      list.pool.put(list.begin + to + __popc(passing[e] & lanes_before()),
                    {offers.first[e], list.scores.earliness(list.row, from + v + e)}, offers.second[e]);
    to += __popc(passing[e]);
  }
  return true;
}

template <typename C, bool Keyed>
__global__ void __launch_bounds__(kFilterThreads, 5)
    batch_topk_encode_append(Pool<C> pool, Scores<C> scores, Step<C>* now) {
  Share share(scores.splits, scores.stripe.count, kGroup<C>);
  if (share.row >= scores.rows) return;
  ExactRow<C, Keyed> row(Lists<C>{}, scores.stripe, scores.latents, share.row);
  Rank<C> bound = now->bound;
  int64_t count = now->count;
  PoolList<C> list{pool, scores, now, bound, share.row, now->half * pool.capacity + count, pool.capacity - count,
                   threshold_below<C>(bound.order)};
  scan<C>(row, list, share.begin, share.end, scores.stripe.begin);
}

// ---- where there is no room ----

// Calls visit(rank, score) for all that may be among the largest, each by one thread, all of them together.
template <typename C, bool Keyed, typename Visit>
__device__ __forceinline__ void each_possible(const Pool<C>& pool, const Scores<C>& scores, const Step<C>& step,
                                              const Visit& visit) {
  int64_t threads = int64_t(gridDim.x) * blockDim.x, begin = step.half * pool.capacity;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < step.count; i += threads)
    visit(pool.rank(begin + i), pool.score[begin + i]);
  Share share(scores.splits, scores.stripe.count, kGroup<C>);
  if (share.row >= scores.rows) return;
  ExactRow<C, Keyed> row(Lists<C>{}, scores.stripe, scores.latents, share.row);
#pragma unroll 1
  for (int group = share.begin; group < share.end; group += kGroup<C>) {
    int v = group + lane_index() * Packet<C>::size;
    Offers<C> offers = row.offers(v);
#pragma unroll
    for (int e = 0; e < Packet<C>::size; ++e) {
      Rank<C> rank{offers.first[e], scores.earliness(share.row, scores.stripe.begin + v + e)};
      if (rank.order != 0 && rank.reaches(step.bound)) visit(rank, offers.second[e]);
    }
  }
}

// What is known when this digit's values have been counted. By all threads of the block.
template <typename C>
__device__ Choice<C> choose(DigitStorage& shared, const Search<C>& search, int digit) {
  Choice<C> choice = search.choices[digit];
  if (choice.settled) return choice;
  constexpr int each = kDigitValues / kPoolThreads;
  const unsigned long long* counts = search.counts + int64_t(digit) * kDigitValues;
  int thread = int(threadIdx.x);
  int64_t own = 0, above = 0, wanted = choice.wanted;
  for (int i = 0; i < each; ++i) own += int64_t(counts[thread * each + i]);
  shared.above[thread] = (unsigned long long)(own);
  __syncthreads();
  for (int other = thread + 1; other < kPoolThreads; ++other) above += int64_t(shared.above[other]);
  if (above < wanted && wanted <= above + own) {  // of one thread
    int value = thread * each + each - 1;
    int64_t its = int64_t(counts[value]);
    while (above + its < wanted) {
      above += its;
      its = int64_t(counts[--value]);
    }
    shared.value = value;
    shared.wanted = wanted - above;
    shared.settled = its == wanted - above;
  }
  __syncthreads();
  search.digits.set(choice.bound, digit, shared.value);
  choice.wanted = shared.wanted;
  choice.settled = shared.settled;
  return choice;
}

__device__ __forceinline__ void clear_counts(unsigned long long* counts) {
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < kDigitValues) counts[i] = 0;
}

// Counts a digit's values among those with the digits before it that the choice so far has.
template <typename C, bool Keyed>
__global__ void __launch_bounds__(kPoolThreads, 4)
    batch_topk_encode_count(Pool<C> pool, Scores<C> scores, const Step<C>* now, int64_t limit, Search<C> search,
                            int digit) {
  Step<C> step = *now;
  if (!step.overflows(limit)) return;
  auto& shared = shared_storage<DigitStorage>();
  if (digit + 1 < search.digits.count()) clear_counts(search.counts + int64_t(digit + 1) * kDigitValues);
  Choice<C> choice = digit ? choose(shared, search, digit - 1) : Choice<C>{{0, 0}, pool.total, false};
  if (blockIdx.x == 0 && threadIdx.x == 0) search.choices[digit] = choice;
  if (choice.settled) return;
  for (int value = int(threadIdx.x); value < kDigitValues; value += int(blockDim.x)) shared.count[value] = 0;
  __syncthreads();
  each_possible<C, Keyed>(pool, scores, step, [&](const Rank<C>& rank, C) {
    if (search.digits.same_before(rank, choice.bound, digit))
      atomicAdd(&shared.count[search.digits.value(rank, digit)], 1u);
  });
  __syncthreads();
  unsigned long long* counts = search.counts + int64_t(digit) * kDigitValues;
  for (int value = int(threadIdx.x); value < kDigitValues; value += int(blockDim.x))
    if (unsigned count = shared.count[value]) atomicAdd(counts + value, (unsigned long long)(count));
}

// Moves the `total` largest to the pool's other half. The next step begins with what is there then.
template <typename C, bool Keyed>
__global__ void __launch_bounds__(kPoolThreads, 4)
    batch_topk_encode_keep(Pool<C> pool, Scores<C> scores, Step<C>* now, int64_t limit, Search<C> search) {
  Rank<C> bound = now->bound;
  Step<C> step{bound, now->count, now->half, now->appended, 0};  // all but `kept`, which others change
  bool first = blockIdx.x == 0 && threadIdx.x == 0;
  if (!step.overflows(limit)) {
    if (first) now[1] = {bound, step.count + int64_t(step.appended), step.half, 0, 0};
    return;
  }
  clear_counts(search.counts);
  Choice<C> choice = choose(shared_storage<DigitStorage>(), search, search.digits.count() - 1);
  int half = 1 - step.half;
  each_possible<C, Keyed>(pool, scores, step, [&](const Rank<C>& rank, C score) {
    if (!rank.reaches(choice.bound)) return;
    int64_t at = int64_t(atomicAdd(&now->kept, 1ull));
    pool.put(half * pool.capacity + at, rank, score);
  });
  // A bound whose last digits aren't known is lower than it could be, even than the one before.
  if (first) now[1] = {choice.bound.reaches(bound) ? choice.bound : bound, pool.total, half, 0, 0};
}

// ---- the result ----

// Before all stripes: the first step, and no counts.
template <typename C>
__global__ void batch_topk_encode_begin(Step<C>* first, Search<C> search, Order<C>* least) {
  clear_counts(search.counts);
  if (blockIdx.x || threadIdx.x) return;
  *first = {{0, 0}, 0, 0, 0, 0};
  *least = kNan<C>;
}

// Pairs of the entries' places, to be sorted, and their scores' bits. There are fewer than `total` only in a CUDA graph,
// where nobody counts eligible latents; then zeros at the last place make up the rest.
template <typename C>
__global__ void __launch_bounds__(kPoolThreads, 4)
    batch_topk_encode_pairs(Pool<C> pool, const Step<C>* end, int64_t places, uint64_t* keys, uint64_t* scores,
                            Order<C>* least) {
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  bool there = i < Least()(pool.total, end->count);
  int64_t at = end->half * pool.capacity + i;
  Rank<C> rank = there ? pool.rank(at) : Rank<C>{kNan<C>, 0};
  if (i < pool.total) {
    keys[i] = uint64_t(places - 1) - rank.earliness;
    scores[i] = there ? uint64_t(bits_of(pool.score[at])) : 0;
  }
  Order<C> smallest = across_block(shared_storage<BlockScratch>(), rank.order, Least());
  using Word = std::conditional_t<sizeof(C) == 8, unsigned long long, unsigned>;
  if (threadIdx.x == 0) atomicMin(reinterpret_cast<Word*>(least), Word(smallest));
}

template <typename T> struct BatchCode {
  T* values;
  int64_t *indices, *offsets;
  Accumulator<T>* threshold;
};

// From the places in ascending order.
template <typename T>
__global__ void __launch_bounds__(kPoolThreads, 4)
    batch_topk_encode_write(const uint64_t* keys, const uint64_t* scores, const Order<Accumulator<T>>* least,
                            int64_t total, int64_t N, int64_t M, bool relu, BatchCode<T> code) {
  using C = Accumulator<T>;
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i == 0) {
    Order<C> order = *least;
    *code.threshold = number_of(order & kSign<C> ? order ^ kSign<C> : ~order);
  }
  if (i < total) {
    C score = number_of(Order<C>(scores[i]));
    if (relu && score <= 0) score = 0;  // NaN stays
    code.values[i] = narrow<T>(score);
    code.indices[i] = int64_t(keys[i] % uint64_t(M));
  }
  if (i > N) return;
  int64_t low = 0, high = total;  // how many places are before row i
  while (low < high) {
    int64_t middle = (low + high) / 2;
    if (keys[middle] < uint64_t(i) * uint64_t(M)) low = middle + 1;
    else high = middle;
  }
  code.offsets[i] = low;
}

}  // namespace fastsparse::cuda
