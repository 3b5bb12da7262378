// The k largest of x @ weight.T + bias per row, on the device.
//
// The vendor's library multiplies a block of rows (tokens) with a stripe of latents; its scores, 32 MB of them, stay in
// the L2 cache. A warp a row then reads them once against the row's threshold, which all but a few are below, and
// appends the rest to the row's list; a full list is reduced to its k best, which raises the threshold. So a row's list
// takes about k log2(M / stripe) candidates in all, each reduction halves it, and no list overflows.
//
// Bytes and floor on an H200, of N=8192, D=4096, M=131072 in bf16: the product is 8.8 TFLOP, 11.2 ms at 790 TFLOP/s;
// the filter reads N M 4 = 4.3 GB of scores from L2, 0.7 ms at some 6 TB/s, in 128 launches. At D=768, M=32768 it is
// 0.52 ms to 0.18 ms: there a product that filters in its epilogue has the better floor.
//
// fp32 is screened (METHODS.md 1): the product runs on bf16 copies, each score stands for a bracket around the exact
// one, rows keep whatever may still be among the k best, and those few are scored again in fp32.
#pragma once

#include "cuda/select.cuh"

namespace fastsparse::cuda {

inline constexpr int kFilterThreads = 128, kSelectThreads = 256;
inline constexpr int kMostSorted = 1024;  // the largest k that one block sorts in shared memory
inline constexpr int kInFlight = 4;       // packets of scores that a lane waits for together
// Latents that a warp looks at together, one packet a lane.
template <typename C> inline constexpr int kGroup = kWarp * Packet<C>::size;

// What belongs to each latent, in the accumulation type; padded with whatever is finite to a whole group.
template <typename C> struct Latents {
  const C* bias;
  // Only where keys differ from scores (by a scale, an absolute value) or latents differ in eligibility:
  const C* scale;
  const uint8_t* eligible;
  bool absolute;
};

template <int Size> struct alignas(Size) Flags {
  uint8_t value[Size];
};

// Latents [begin, begin + count) and their products with a block of rows, `stride` apart; both ends on 16 bytes.
template <typename C> struct Stripe {
  const C* products;
  int64_t stride;
  int begin, count;
};

// ---- the latents' terms ----

template <typename T>
__global__ void topk_encode_prepare(const T* bias, int64_t bias_stride, const T* scale, int64_t scale_stride,
                                    const uint8_t* mask, int64_t mask_stride, int64_t M, int64_t padded,
                                    Accumulator<T>* bias_out, Accumulator<T>* scale_out, uint8_t* eligible_out) {
  using C = Accumulator<T>;
  int64_t m = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (m >= padded) return;
  bool real = m < M;
  bias_out[m] = real && bias ? widen(bias[m * bias_stride]) : C(0);
  if (!scale_out) return;
  scale_out[m] = real && scale ? widen(scale[m * scale_stride]) : C(1);
  eligible_out[m] = real && (!mask || mask[m * mask_stride]);
}

// ---- the filter ----

template <typename C> struct Offers {
  Order<C> first[Packet<C>::size];  // 0: none
  C second[Packet<C>::size];
};

// A row's exact scores. `Keyed`: keys differ from scores, or latents in eligibility.
template <typename C, bool Keyed> struct ExactRow {
  static constexpr int size = Packet<C>::size;
  const C* products;
  Latents<C> latents;  // from the stripe's begin
  int count, k;

  __device__ __forceinline__ ExactRow(const Lists<C>& lists, const Stripe<C>& stripe, const Latents<C>& of, int64_t row)
      : products(stripe.products + row * stripe.stride), latents(of), count(stripe.count), k(lists.k) {
    latents.bias += stripe.begin;
    if constexpr (Keyed) {
      latents.scale += stripe.begin;
      latents.eligible += stripe.begin;
    }
  }

  __device__ __forceinline__ bool eligible(int v) const {
    if constexpr (Keyed) return v < count && latents.eligible[v];
    else return v < count;
  }
  // The keys at latents v, v + 1, ..., given their products, which become scores.
  __device__ __forceinline__ Packet<C> keys(Packet<C>& scores, int v) const {
    Packet<C> bias = load_packet(latents.bias + v), keys;
#pragma unroll
    for (int e = 0; e < size; ++e) keys.value[e] = scores.value[e] += bias.value[e];
    if constexpr (Keyed) {
      Packet<C> scale = load_packet(latents.scale + v);
#pragma unroll
      for (int e = 0; e < size; ++e) {
        keys.value[e] *= scale.value[e];
        if (latents.absolute) keys.value[e] = fabs(keys.value[e]);
      }
    }
    return keys;
  }
  __device__ __forceinline__ bool may_pass(Packet<C> scores, int v, C bound) const {
    Packet<C> of = keys(scores, v);
    Flags<size> eligible;
    if constexpr (Keyed) eligible = *reinterpret_cast<const Flags<size>*>(latents.eligible + v);
    bool any = false;
#pragma unroll
    for (int e = 0; e < size; ++e) {
      bool above = !(of.value[e] <= bound);
      if constexpr (Keyed) above = above && eligible.value[e];
      any |= above;
    }
    return any;
  }
  __device__ __forceinline__ Offers<C> offers(int v) const {
    Packet<C> scores = load_packet(products + v), of = keys(scores, v);
    Offers<C> offers;
#pragma unroll
    for (int e = 0; e < size; ++e) {
      offers.first[e] = eligible(v + e) ? order_of(of.value[e]) : 0;
      offers.second[e] = scores.value[e];
    }
    return offers;
  }
  __device__ __forceinline__ bool make_room(List<C>& list) const {
    keep_best(list, k);
    return true;
  }
};

// Appends what passes of one group of latents, `from` being the first latent of the stripe. False: the row is hopeless.
template <typename C, typename Row>
__device__ __forceinline__ bool append(const Row& row, List<C>& list, int group, int from) {
  constexpr int size = Packet<C>::size;
  int v = group + lane_index() * size;
  Offers<C> offers;
  unsigned passing[size];
  for (;;) {
    offers = row.offers(v);  // again after making room, which needs the registers
    int total = 0;
#pragma unroll
    for (int e = 0; e < size; ++e) {
      passing[e] = __ballot_sync(kAllLanes, offers.first[e] > list.threshold);
      total += __popc(passing[e]);
    }
    if (total == 0) return true;
    if (list.count + total <= list.lists.capacity) break;
    if (!row.make_room(list)) return false;
  }
  int to = list.count;
#pragma unroll
  for (int e = 0; e < size; ++e) to += __popc(passing[e] & lanes_before());
#pragma unroll
  for (int e = 0; e < size; ++e) {
    list.count += __popc(passing[e]);
    if (offers.first[e] <= list.threshold) continue;
    list.first(to) = offers.first[e];
    list.second(to) = offers.second[e];
    list.latent(to) = from + v + e;
    ++to;
  }
  return true;  // whoever reads the list next, in making room for one, synchronises the warp first
}

// Offers latents [begin, end) of a row's stripe, both whole groups, to its list. Almost always nothing passes: then
// this costs one load and the row's own arithmetic. False: the row is hopeless.
template <typename C, typename Row, typename Taking>
__device__ __forceinline__ bool scan(const Row& row, Taking& list, int begin, int end, int from) {
  constexpr int step = kInFlight * kGroup<C>;
  const int offset = lane_index() * Packet<C>::size;
  C bound = bound_of<C>(list.threshold);
#pragma unroll 1
  for (int group = begin; group < end; group += step) {
    if (group + step <= end) {
      Packet<C> products[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) products[i] = load_packet(row.products + group + offset + i * kGroup<C>);
      bool any = false;
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) any |= row.may_pass(products[i], group + offset + i * kGroup<C>, bound);
      if (!__any_sync(kAllLanes, any)) continue;
    }
    int last = Least()(end, group + step);
#pragma unroll 1
    for (int each = group; each < last; each += kGroup<C>)
      if (!append(row, list, each, from)) return false;
    bound = bound_of<C>(list.threshold);
  }
  return true;
}

// Which list a warp serves, and which part of every stripe.
struct Share {
  int list, row, begin, end;

  // With few rows each has `splits` lists, which take equal parts of every stripe, in whole groups.
  __device__ __forceinline__ Share(int splits, int count, int group) {
    list = int(blockIdx.x * (blockDim.x / kWarp)) + warp_index();
    row = list / splits;
    int64_t groups = (count + group - 1) / group;
    int split = list - row * splits;
    begin = int(groups * split / splits) * group;
    end = int(groups * (split + 1) / splits) * group;
  }
};

template <typename C, bool Keyed>
__global__ void __launch_bounds__(kFilterThreads, Keyed ? 5 : 8)
    topk_encode_filter(Lists<C> lists, Stripe<C> stripe, Latents<C> latents, int rows, int splits) {
  Share share(splits, stripe.count, kGroup<C>);
  if (share.row >= rows) return;
  List<C> list(lists, share.list);
  if (stripe.begin > 0) list.resume();
  ExactRow<C, Keyed> row(lists, stripe, latents, share.row);
  scan<C>(row, list, share.begin, share.end, stripe.begin);
  list.suspend();
}

// ---- the result ----

// How a candidate comes out: its value rounded and activated.
template <typename T> struct Output {
  T* values;  // k in a row
  int64_t* indices;
  int32_t stride;  // between rows of both
  int32_t first;   // the first of the latents, where they are a group of more
  bool relu;

  __device__ __forceinline__ void write(int64_t row, int64_t j, Accumulator<T> score, int32_t latent) const {
    if (relu && score <= 0) score = 0;  // NaN stays
    int64_t at = row * stride + j;
    values[at] = narrow<T>(score);
    indices[at] = first + latent;
  }
};

// Calls place(j, latent) for j in [taken, k) with the lowest latents that aren't eligible. There are fewer than k
// eligible ones only in a CUDA graph, where nobody counts them; then these make up the rest, with value 0. By one warp.
template <typename Place>
__device__ void fill_up(int taken, int k, const uint8_t* eligible, int64_t M, const Place& place) {
  for (int64_t base = 0; base < M && taken < k; base += kWarp) {
    int64_t m = base + lane_index();
    bool spare = m < M && !eligible[m];
    unsigned spares = __ballot_sync(kAllLanes, spare);
    int j = taken + __popc(spares & lanes_before());
    if (spare && j < k) place(j, int32_t(m));
    taken += __popc(spares);
  }
}

// All candidates of a row, in its `splits` lists, dealt out to the threads of a block.
template <typename C> struct Entries {
  Lists<C> lists;
  int64_t begin;
  int splits;

  template <typename Visit> __device__ __forceinline__ void each(int rank, int step, const Visit& visit) const {
    for (int s = 0; s < splits; ++s) {
      int64_t base = (begin + s) * lists.capacity;
      int count = lists.count[begin + s];
      for (int i = rank; i < count; i += step) visit(base + i);
    }
  }
  template <typename Visit> __device__ __forceinline__ void each_by_thread(const Visit& visit) const {
    each(int(threadIdx.x), int(blockDim.x), visit);
  }
  // Count of those that satisfy a predicate, for all threads of the block.
  template <typename Predicate>
  __device__ __forceinline__ int count(BlockScratch& scratch, const Predicate& predicate) const {
    int counted = 0;
    each_by_thread([&](int64_t at) { counted += predicate(at); });
    return across_block(scratch, counted, Sum());
  }
  __device__ __forceinline__ bool hopeless() const {
    bool any = false;
    for (int s = 0; s < splits; ++s) any |= lists.count[begin + s] == kHopeless;
    return any;
  }
};

// A bound on the k-th largest of order(at) over a row's entries; orders of 0 don't count.
template <typename O, typename C, typename OrderAt>
__device__ Bound<O> bound_of_entries(BlockScratch& scratch, const Entries<C>& entries, int k,
                                     const OrderAt& order) {
  O low = ~O(0), high = 0;
  int all = 0;
  entries.each_by_thread([&](int64_t at) {
    O value = order(at);
    if (value == 0) return;
    low = Least()(low, value);
    high = Most()(high, value);
    ++all;
  });
  all = across_block(scratch, all, Sum());
  low = across_block(scratch, low, Least());
  high = across_block(scratch, high, Most());
  auto reaching = [&](O bound) { return entries.count(scratch, [&](int64_t at) { return order(at) >= bound; }); };
  return bound_by_bisection(k, all, low, high, reaching);
}

template <typename C> struct SelectStorage {
  Ranked<C> best[kMostSorted];
  BlockScratch scratch;
  int taken;
};

// The k <= kMostSorted best of a row's candidates in order. By all threads of the block.
template <typename T>
__device__ void select_row(const Entries<Accumulator<T>>& entries, const Output<T>& output, int64_t row,
                           const uint8_t* eligible, int64_t M) {
  using C = Accumulator<T>;
  auto& shared = shared_storage<SelectStorage<C>>();
  const Lists<C>& lists = entries.lists;
  int k = lists.k, size = 1;
  while (size < k) size *= 2;
  for (int i = int(threadIdx.x); i < size; i += int(blockDim.x)) shared.best[i] = {0, 0, C(0)};
  if (threadIdx.x == 0) shared.taken = 0;

  auto order = [&](int64_t at) { return lists.first[at]; };
  Bound<Order<C>> bound = bound_of_entries<Order<C>>(shared.scratch, entries, k, order);
  uint32_t earliest = 0;  // of those that equal the bound, only latents with ~latent >= earliest
  if (bound.reaching > k) {
    int above = entries.count(shared.scratch, [&](int64_t at) { return lists.first[at] > bound.order; });
    auto among_equals = [&](int64_t at) { return lists.first[at] == bound.order ? ~uint32_t(lists.latent[at]) : 0u; };
    earliest = bound_of_entries<uint32_t>(shared.scratch, entries, k - above, among_equals).order;
  }
  // shared.best and shared.taken are set: there are barriers in finding the bound.
  entries.each_by_thread([&](int64_t at) {
    Order<C> first = lists.first[at];
    int32_t latent = lists.latent[at];
    if (first == 0 || first < bound.order || (first == bound.order && ~uint32_t(latent) < earliest)) return;
    shared.best[atomicAdd(&shared.taken, 1)] = {first, latent, lists.second[at]};  // any order: sorting is next
  });
  sort_ranked(shared.best, size);
  int taken = shared.taken;
  for (int j = int(threadIdx.x); j < taken; j += int(blockDim.x))
    output.write(row, j, shared.best[j].score, shared.best[j].latent);
  if (taken < k && warp_index() == 0)
    fill_up(taken, k, eligible, M, [&](int j, int32_t latent) { output.write(row, j, C(0), latent); });
}

template <typename T>
__global__ void __launch_bounds__(kSelectThreads, 4)
    topk_encode_select(Lists<Accumulator<T>> lists, int splits, Output<T> output, const uint8_t* eligible, int64_t M) {
  Entries<Accumulator<T>> entries{lists, int64_t(blockIdx.x) * splits, splits};
  select_row(entries, output, blockIdx.x, eligible, M);
}

// For a k that no block sorts: the k best of each row as integers of their order, for a stable sort. A warp a row.
template <typename C>
__global__ void __launch_bounds__(kFilterThreads, 8)
    topk_encode_rank(Lists<C> lists, int rows, const uint8_t* eligible, int64_t M, int64_t* ranks) {
  int row = int(blockIdx.x * (blockDim.x / kWarp)) + warp_index(), k = lists.k;
  if (row >= rows) return;
  List<C> list(lists, row);
  list.resume();
  if (list.count > k) keep_best(list, k);
  if (list.count < k) {
    fill_up(list.count, k, eligible, M, [&](int j, int32_t latent) {
      list.first(j) = 0;
      list.second(j) = C(0);
      list.latent(j) = latent;
    });
    __syncwarp();
  }
  constexpr uint64_t flip = sizeof(C) == 8 ? uint64_t(kSign<C>) : 0;  // to a signed integer of the same order
  for (int j = lane_index(); j < k; j += kWarp) ranks[int64_t(row) * k + j] = int64_t(uint64_t(list.first(j)) ^ flip);
}

// places: (rows, k), where in its list each row's j-th best stands.
template <typename T>
__global__ void topk_encode_write(Lists<Accumulator<T>> lists, int64_t rows, const int64_t* places, Output<T> output) {
  int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, row = at / lists.k;
  if (row >= rows) return;
  int64_t from = row * lists.capacity + places[at];
  output.write(row, at - row * lists.k, lists.second[from], lists.latent[from]);
}

}  // namespace fastsparse::cuda
