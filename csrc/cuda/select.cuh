// The k largest of many keys: keys as integers of the same order, bounds by bisection, lists of candidates.
#pragma once

#include "cuda/device.cuh"

namespace fastsparse::cuda {

// ---- keys as unsigned integers of the same order: NaN above all, -0 equal to 0. No key becomes 0. ----

template <typename C> struct OrderOf { using type = uint32_t; };
template <> struct OrderOf<double> { using type = uint64_t; };
template <typename C> using Order = typename OrderOf<C>::type;

template <typename C> inline constexpr Order<C> kNan = ~Order<C>(0);
template <typename C> inline constexpr Order<C> kSign = Order<C>(1) << (8 * sizeof(C) - 1);

__device__ __forceinline__ uint32_t bits_of(float value) { return __float_as_uint(value); }
__device__ __forceinline__ uint64_t bits_of(double value) { return uint64_t(__double_as_longlong(value)); }
__device__ __forceinline__ float number_of(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ double number_of(uint64_t bits) { return __longlong_as_double((long long)(bits)); }

template <typename C> __device__ __forceinline__ Order<C> order_of(C key) {
  if (key != key) return kNan<C>;
  Order<C> bits = bits_of(key + C(0));
  return bits & kSign<C> ? ~bits : bits | kSign<C>;
}

// The number b for which !(key <= b) holds of every key whose order is above a threshold. (NaN, which lets all pass,
// for the threshold 0.)
template <typename C> __device__ __forceinline__ C bound_of(Order<C> threshold) {
  if (threshold == kNan<C>) threshold = order_of(C(INFINITY));
  return number_of(threshold & kSign<C> ? threshold ^ kSign<C> : ~threshold);
}

// The threshold above which are all keys whose orders are at least this one: never that of -0, which no key has, nor one
// between those of infinity and of NaN.
template <typename C> __device__ __forceinline__ Order<C> threshold_below(Order<C> order) {
  Order<C> most = order_of(C(INFINITY)), below = order == kSign<C> ? order - 2 : order ? order - 1 : 0;
  return below < most ? below : most;
}

// ---- threads that work together ----

__device__ __forceinline__ int lane_index() { return int(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_index() { return int(threadIdx.x) / kWarp; }
__device__ __forceinline__ unsigned lanes_before() { return (1u << lane_index()) - 1; }

template <typename T, typename Combine> __device__ __forceinline__ T across_warp(T value, Combine combine) {
#pragma unroll
  for (int apart = kWarp / 2; apart; apart /= 2) value = combine(value, __shfl_xor_sync(kAllLanes, value, apart));
  return value;
}

struct Sum {
  template <typename T> __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
};
struct Most {
  template <typename T> __device__ __forceinline__ T operator()(T a, T b) const { return a < b ? b : a; }
};
struct Least {
  template <typename T> __device__ __forceinline__ T operator()(T a, T b) const { return b < a ? b : a; }
};

// Combines a value of every thread of the block; to be called by all of them.
struct BlockScratch {
  uint64_t part[kWarp];
};
template <typename T, typename Combine>
__device__ __forceinline__ T across_block(BlockScratch& scratch, T value, Combine combine) {
  value = across_warp(value, combine);
  __syncthreads();  // the parts of the last call have been read
  if (lane_index() == 0) scratch.part[warp_index()] = uint64_t(value);
  __syncthreads();
  T result = T(scratch.part[0]);
  for (int warp = 1; warp < int(blockDim.x) / kWarp; ++warp) result = combine(result, T(scratch.part[warp]));
  return result;
}

// ---- bounds ----

template <typename O> struct Bound {
  O order;
  int reaching;
};

// A bound that k or more of a set of orders reach: exactly k do, or it is the k-th largest order itself. All lie in
// [low, high], and `all` >= k is how many there are; reaching(bound) counts those >= bound. A bit of the orders a step.
template <typename O, typename Reaching>
__device__ Bound<O> bound_by_bisection(int k, int all, O low, O high, const Reaching& reaching) {
  Bound<O> bound{low, all};
  while (bound.order < high && bound.reaching > k) {
    O middle = high - (high - bound.order) / 2;
    int count = reaching(middle);
    if (count < k) high = middle - 1;
    else bound = {middle, count};
  }
  return bound;
}

// ---- lists of candidates ----

// Every list's candidates in the ascending order of their latents. A list belongs to one warp.
template <typename C> struct Lists {
  int k, capacity;
  Order<C>* first;      // (lists, capacity) order of the key; in a screen of the key's upper bound
  C* second;            // (lists, capacity) score; in a screen the key's lower bound
  int32_t* latent;      // (lists, capacity)
  int32_t* count;       // (lists), or kHopeless: the screen can't decide this row
  Order<C>* threshold;  // (lists) only what is above it can be among the k best
};
inline constexpr int32_t kHopeless = -1;

// One list, its state in the registers of its warp.
template <typename C> struct List {
  const Lists<C>& lists;
  int64_t index, begin;
  int count = 0;
  Order<C> threshold = 0;

  __device__ __forceinline__ List(const Lists<C>& lists, int64_t index)
      : lists(lists), index(index), begin(index * lists.capacity) {}
  __device__ __forceinline__ void resume() {
    count = lists.count[index];
    threshold = lists.threshold[index];
  }
  __device__ __forceinline__ void suspend() const {
    __syncwarp();  // all lanes have read what one overwrites
    if (lane_index() != 0) return;
    lists.count[index] = count;
    lists.threshold[index] = threshold;
  }
  __device__ __forceinline__ Order<C>& first(int i) const { return lists.first[begin + i]; }
  __device__ __forceinline__ C& second(int i) const { return lists.second[begin + i]; }
  __device__ __forceinline__ int32_t& latent(int i) const { return lists.latent[begin + i]; }
};

// The k-th largest of a list's orders, which order(i) yields, and how many reach it.
template <typename O, typename OrderAt> __device__ Bound<O> bound_of_list(int k, int count, const OrderAt& order) {
  int lane = lane_index();
  O low = ~O(0), high = 0;
#pragma unroll 1
  for (int i = lane; i < count; i += kWarp) {
    O value = order(i);
    low = Least()(low, value);
    high = Most()(high, value);
  }
  auto reaching = [&](O bound) {
    int reached = 0;
#pragma unroll 4
    for (int i = lane; i < count; i += kWarp) reached += order(i) >= bound;
    return across_warp(reached, Sum());
  };
  Bound<O> bound = bound_by_bisection(k, count, across_warp(low, Least()), across_warp(high, Most()), reaching);
  low = ~O(0);  // a bound that exactly k reach may lie far below them
#pragma unroll 1
  for (int i = lane; i < count; i += kWarp)
    if (O value = order(i); value >= bound.order) low = Least()(low, value);
  bound.order = across_warp(low, Least());
  return bound;
}

// Drops the candidates below `bound` and all but the earliest `ties` of those equal to it; keeps the order.
template <typename C> __device__ void keep_reaching(List<C>& list, Order<C> bound, int ties) {
  int lane = lane_index(), kept = 0, equals = 0;
#pragma unroll 1
  for (int base = 0; base < list.count; base += kWarp) {
    int i = base + lane;
    bool there = i < list.count;
    Order<C> first = there ? list.first(i) : 0;
    C second = there ? list.second(i) : C(0);
    int32_t latent = there ? list.latent(i) : 0;
    unsigned equal = __ballot_sync(kAllLanes, there && first == bound);
    bool keep = there && (first > bound || (first == bound && equals + __popc(equal & lanes_before()) < ties));
    unsigned keeping = __ballot_sync(kAllLanes, keep);
    int to = kept + __popc(keeping & lanes_before());
    __syncwarp();  // all have read: some lie where others go
    if (keep) {
      list.first(to) = first;
      list.second(to) = second;
      list.latent(to) = latent;
    }
    kept += __popc(keeping);
    equals += __popc(equal);
  }
  list.count = kept;
  __syncwarp();
}

// Reduces a list of more than k to its k best. Another candidate must be larger than the new threshold: one that
// equals it comes later than the k there are.
template <typename C> __device__ void keep_best(List<C>& list, int k) {
  __syncwarp();
  auto order = [&](int i) { return list.first(i); };
  Bound<Order<C>> bound = bound_of_list<Order<C>>(k, list.count, order);
  int ties = k;
  if (bound.reaching > k && bound.order < kNan<C>) {
    int above = 0;
#pragma unroll 1
    for (int i = lane_index(); i < list.count; i += kWarp) above += list.first(i) > bound.order;
    ties = k - across_warp(above, Sum());
  }
  keep_reaching(list, bound.order, ties);
  list.threshold = bound.order;
}

// ---- the final order ----

template <typename C> struct Ranked {
  Order<C> order;
  int32_t latent;
  C score;

  __device__ __forceinline__ bool before(const Ranked& other) const {
    return order > other.order || (order == other.order && latent < other.latent);
  }
};

// Sorts `size`, a power of two, in shared memory: Batcher's bitonic sort. By all threads of the block.
template <typename C> __device__ void sort_ranked(Ranked<C>* ranked, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int apart = run / 2; apart; apart /= 2) {
      __syncthreads();
      for (int pair = int(threadIdx.x); pair < size / 2; pair += int(blockDim.x)) {
        int low = 2 * pair - (pair & (apart - 1)), high = low + apart;
        Ranked<C> a = ranked[low], b = ranked[high];
        if (((low & run) == 0) == b.before(a)) {
          ranked[low] = b;
          ranked[high] = a;
        }
      }
    }
  }
  __syncthreads();
}

}  // namespace fastsparse::cuda
