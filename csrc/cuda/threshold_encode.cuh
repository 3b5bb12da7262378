// Every score of x @ weight.T + bias that isn't at most its latent's threshold, row by row, on the device.
//
// The vendor's library multiplies a block of rows (tokens) with a stripe of latents; its scores, 32 MB of them, stay in
// the L2 cache. A warp then reads a row's part of a stripe once: it leaves a bit a score, set where it passes, and how
// many do. From the counts of the parts before it every part finds where its entries go, behind all that are there, and
// appends the marked scores. So entries lie block by block and stripe by stripe, as many as there is room for, in an
// order that shapes and data alone decide. When all counts are there, their running sum says where each part belongs in
// the result, and its entries are moved there.
//
// Bytes and floor on an H200, of N=8192, D=4096, M=131072 in bf16: the product is 8.8 TFLOP, 11.2 ms at 790 TFLOP/s;
// marking reads N M 4 = 4.3 GB of scores from L2, 0.7 ms at some 6 TB/s, appending 1/32 of that in bits; 256 launches.
// An entry is written, read and written again, 28 bytes: at a density of 1 %, 11M of them, 0.07 ms.
#pragma once

#include "cuda/topk_encode.cuh"

namespace fastsparse::cuda {

inline constexpr int kMarkThreads = 256;
inline constexpr int kMarkWarps = kMarkThreads / kWarp;

// What scores become entries by, of each latent in the accumulation type; padded to a whole group of ineligible ones.
template <typename C> struct Criteria {
  const C* bias;
  const C* threshold;
  const uint8_t* eligible;
  bool absolute;
};

// Every row's parts of stripes, one after the other, of which a stripe's are `splits` from `first` on.
struct Parts {
  int32_t* count;  // (N, parts), from the block's first row on: entries of each
  int64_t* start;  // (N, parts), likewise: where they were appended
  int64_t parts;
  int first, splits, rows;

  // Of the stripe's lists, one for each of its parts in every row of the block.
  __device__ __forceinline__ int64_t at(int list) const {
    int row = list / splits;
    return row * parts + first + list - row * splits;
  }
};

// A stripe's marks: of each group of latents a word for every element of a packet, in it a bit for every lane.
struct Marks {
  uint32_t* words;  // rows as far apart as those of the scores, in words
  int32_t* counts;  // of each block of threads
};

// What was appended, so far and in this step: entries before and, to be written, after it.
template <typename C> struct Appended {
  C* values;
  int32_t* latents;
  int64_t capacity;
  const int64_t* before;  // null: none
  int64_t* after;
};

// ---- the latents' terms ----

template <typename T>
__global__ void threshold_encode_prepare(const T* bias, int64_t bias_stride, const Accumulator<T>* threshold,
                                         int64_t threshold_stride, const uint8_t* mask, int64_t mask_stride, int64_t M,
                                         int64_t padded, Accumulator<T>* bias_out, Accumulator<T>* threshold_out,
                                         uint8_t* eligible_out) {
  using C = Accumulator<T>;
  int64_t m = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (m >= padded) return;
  bool real = m < M;
  bias_out[m] = real && bias ? widen(bias[m * bias_stride]) : C(0);
  threshold_out[m] = real ? threshold[m * threshold_stride] : C(0);
  eligible_out[m] = real && (!mask || mask[m * mask_stride]);
}

// ---- a stripe ----

template <typename C>
__global__ void __launch_bounds__(kMarkThreads, 4)
    threshold_encode_mark(Stripe<C> stripe, Criteria<C> criteria, Parts parts, Marks marks) {
  constexpr int size = Packet<C>::size, step = kInFlight * kGroup<C>;
  Share share(parts.splits, stripe.count, kGroup<C>);
  int count = 0;
  if (share.row < parts.rows) {
    const int offset = lane_index() * size;
    const C* products = stripe.products + share.row * stripe.stride + offset;
    uint32_t* words = marks.words + share.row * (stripe.stride / kWarp);
#pragma unroll 1
    for (int begin = share.begin; begin < share.end; begin += step) {
      Packet<C> scores[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i)
        if (begin + i * kGroup<C> < share.end) scores[i] = load_packet(products + begin + i * kGroup<C>);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        int group = begin + i * kGroup<C>, m = stripe.begin + group + offset;
        if (group >= share.end) break;
        Packet<C> bias = load_packet(criteria.bias + m), threshold = load_packet(criteria.threshold + m);
        auto eligible = *reinterpret_cast<const Flags<size>*>(criteria.eligible + m);
#pragma unroll
        for (int e = 0; e < size; ++e) {
          C key = scores[i].value[e] + bias.value[e];
          if (criteria.absolute) key = fabs(key);
          bool passes = eligible.value[e] && !(key <= threshold.value[e]);  // NaN does
          unsigned passing = __ballot_sync(kAllLanes, passes);
          count += __popc(passing);
          if (lane_index() == e) words[group / kWarp + e] = passing;
        }
      }
    }
    if (lane_index() == 0) parts.count[parts.at(share.list)] = count;
  }
  int total = across_block(shared_storage<BlockScratch>(), lane_index() == 0 ? count : 0, Sum());
  if (threadIdx.x == 0) marks.counts[blockIdx.x] = total;
}

// By the blocks and warps that have marked.
template <typename C>
__global__ void __launch_bounds__(kMarkThreads, 4)
    threshold_encode_append(Stripe<C> stripe, Criteria<C> criteria, Parts parts, Marks marks, Appended<C> appended) {
  constexpr int size = Packet<C>::size;
  auto& scratch = shared_storage<BlockScratch>();
  Share share(parts.splits, stripe.count, kGroup<C>);
  int64_t before = 0;
  for (unsigned block = threadIdx.x; block < blockIdx.x; block += blockDim.x) before += marks.counts[block];
  before = across_block(scratch, before, Sum());
  if (appended.before) before += *appended.before;
  if (threadIdx.x == 0 && blockIdx.x == gridDim.x - 1) *appended.after = before + marks.counts[blockIdx.x];

  if (share.row >= parts.rows) return;

  int earlier = share.list - warp_index() + lane_index();  // of the block's
  before += across_warp(earlier < share.list ? parts.count[parts.at(earlier)] : 0, Sum());
  if (lane_index() == 0) parts.start[parts.at(share.list)] = before;
  const int offset = lane_index() * size;
  const C* products = stripe.products + share.row * stripe.stride + offset;
  const uint32_t* words = marks.words + share.row * (stripe.stride / kWarp);
#pragma unroll 1
  for (int group = share.begin; group < share.end; group += kGroup<C>) {
    uint32_t passing[size], any = 0;
#pragma unroll
    for (int e = 0; e < size; ++e) any |= passing[e] = words[group / kWarp + e];
    if (!any) continue;
    int64_t to = before;
#pragma unroll
    for (int e = 0; e < size; ++e) {
      to += __popc(passing[e] & lanes_before());
      before += __popc(passing[e]);
    }
    if (!(any >> lane_index() & 1)) continue;
    int m = stripe.begin + group + offset;
    Packet<C> scores = load_packet(products + group), bias = load_packet(criteria.bias + m);
#pragma unroll
    for (int e = 0; e < size; ++e) {
      if (!(passing[e] >> lane_index() & 1)) continue;
      if (to < appended.capacity) {
        appended.values[to] = scores.value[e] + bias.value[e];
        appended.latents[to] = m + e;
      }
      ++to;
    }
  }
}

// ---- the result ----

template <typename C> struct Code {
  C* values;         // (capacity)
  int64_t* indices;  // (capacity)
  int64_t* offsets;  // (N + 1)
  int64_t capacity;
};

// Moves what was appended to where it belongs, but nothing where there was no room for all. A warp takes kWarp parts of a
// row. ends (N, parts): the running sum of all counts.
template <typename C>
__global__ void __launch_bounds__(kMarkThreads, 4)
    threshold_encode_move(Parts all, const int64_t* ends, int64_t N, Appended<C> appended, Code<C> code) {
  int64_t share = int64_t(blockIdx.x) * kMarkWarps + warp_index(), shares = (all.parts + kWarp - 1) / kWarp;
  int64_t row = share / shares, part = (share - row * shares) * kWarp + lane_index();
  if (row >= N || ends[N * all.parts - 1] > code.capacity) return;
  int64_t at = row * all.parts + Least()(part, all.parts - 1);
  int64_t end = ends[at], begin = end - all.count[at], apart = all.start[at] - begin;
  int64_t from = __shfl_sync(kAllLanes, begin, 0), to = __shfl_sync(kAllLanes, end, kWarp - 1);
#pragma unroll 1
  for (int64_t base = from; base < to; base += kWarp) {
    int64_t place = base + lane_index();
    int lane = 0;  // of the parts that end at the place or before, how many
#pragma unroll
    for (int half = kWarp / 2; half; half /= 2)
      if (__shfl_sync(kAllLanes, end, lane + half - 1) <= place) lane += half;
    int64_t source = place + __shfl_sync(kAllLanes, apart, lane);
    if (place >= to) continue;
    code.values[place] = appended.values[source];
    code.indices[place] = appended.latents[source];
  }
}

// Writes the offsets, and what stands behind the last entry: zeros. Where there was no room for all, all values are NaN.
template <typename C>
__global__ void threshold_encode_finish(const int64_t* ends, int64_t N, int64_t parts, Code<C> code) {
  int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, total = ends[N * parts - 1];
  bool fits = total <= code.capacity;
  if (i <= N) code.offsets[i] = i == 0 ? 0 : Least()(ends[i * parts - 1], code.capacity);
  if (i >= code.capacity || (fits && i < total)) return;
  code.values[i] = fits ? C(0) : C(NAN);
  code.indices[i] = 0;
}

}  // namespace fastsparse::cuda
