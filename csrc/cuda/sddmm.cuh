// out[n, j] = <x[n], weight[indices[n, j]]>: device code.
//
// A group of lanes takes one token and 2^DotBits of its latents: each packet of the token, read once, meets the same
// packet of all of their atoms. Bytes: N k D elements gathered, N k D / 2^DotBits of tokens (from L1, where a block's
// groups find each other's), 8 bytes and a value an entry. Floor: at D=4096 in bf16 8 kB an entry, 1 ms for N=8192,
// k=64 at 4.3 TB/s. Two FLOPs an element: memory-bound everywhere. A lane adds up its columns in order, then lanes are
// added in a tree: the same sum, to the bit, for any DotBits.
//
// A ragged code is one of k = 1, where which token an entry is of has to be searched for: then L1 delivers a row of x
// with every atom, which it can, at 128 bytes a clock and multiprocessor against L2's 40.
#pragma once

#include "cuda/gather.cuh"
#include "cuda/ragged.cuh"

namespace fastsparse::cuda {

inline constexpr int kDotBits = 2;

// The sum of each of Dots accumulators over the group's lanes, for which every lane of the warp must call. Lane l gets
// that of accumulator l / (lanes / Dots): at every halving a lane gives away half of the sums and keeps half.
template <int Dots, typename C> __device__ __forceinline__ C sum_over_lanes(const Group& group, C (&sums)[Dots]) {
  int offset = group.lanes / 2;
#pragma unroll
  for (int left = Dots / 2; left >= 1; left /= 2, offset /= 2) {
    bool upper = group.lane & offset;
#pragma unroll
    for (int i = 0; i < left; ++i) {
      C given = upper ? sums[i] : sums[i + left], kept = upper ? sums[i + left] : sums[i];
      sums[i] = kept + __shfl_xor_sync(kAllLanes, given, offset);
    }
  }
  for (; offset; offset /= 2) sums[0] += __shfl_xor_sync(kAllLanes, sums[0], offset);
  return sums[0];
}

// Ahead: how many packets of each row are in flight at once.
template <typename T, int Width, int DotBits, int Ahead, bool Ragged>
__global__ void __launch_bounds__(kGatherBlock)
    sddmm_dots(const T* x, const T* weight, const int64_t* indices, Tokens tokens, T* out, int64_t N, int64_t k,
               int64_t D, int lane_bits, int64_t x_row, int64_t weight_row, int64_t index_row,
               int64_t index_column) {
  using C = Accumulator<T>;
  constexpr int dots = 1 << DotBits;
  static_assert(DotBits <= kLeastLaneBits, "a lane for every dot product");
  Group group(lane_bits, blockIdx.x);
  int64_t tiles = (k + dots - 1) >> DotBits;  // of a token
  int64_t n = quotient(group.index, tiles), first = (group.index - n * tiles) << DotBits;
  bool inside = n < N;  // groups beyond the last token repeat its work: shuffles need the whole warp
  if (!inside) n = N - 1;

  const T* token = x + (Ragged ? tokens.of(n) : n) * x_row;
  if (Ragged && n >= tokens.live(N)) D = 0;  // padding, of which comes 0
  const T* atoms[dots];
#pragma unroll
  for (int i = 0; i < dots; ++i) {
    int64_t j = first + i < k ? first + i : k - 1;
    atoms[i] = weight + indices[n * index_row + j * index_column] * weight_row;
  }

  // Every packet is asked for a turn before it is used, in place of the one just used, so that all are in flight at all
  // times; left to itself the compiler has two of them in flight.
  const int64_t step = int64_t{Width} << lane_bits;
  int64_t column = int64_t{group.lane} * Width;
  Columns<T, Width> mine[Ahead] = {}, theirs[Ahead][dots] = {};
  auto load = [&](Columns<T, Width>& packet, const T* row, int64_t at) {
    if (at < D) packet = load_columns<T, Width>(row + at);
  };
#pragma unroll
  for (int a = 0; a < Ahead; ++a) {
    load(mine[a], token, column + a * step);
#pragma unroll
    for (int i = 0; i < dots; ++i) load(theirs[a][i], atoms[i], column + a * step);
  }
  C sums[dots] = {};
  while (column < D) {
#pragma unroll
    for (int a = 0; a < Ahead; ++a, column += step) {
      int64_t next = column + Ahead * step;
      bool some = Ahead == 1 || column < D;
      C left[Width], right[Width];
      widen_columns<T, Width>(mine[a], left);
      load(mine[a], token, next);
#pragma unroll
      for (int i = 0; i < dots; ++i) {
        widen_columns<T, Width>(theirs[a][i], right);
        load(theirs[a][i], atoms[i], next);
        if (some)
#pragma unroll
          for (int c = 0; c < Width; ++c) sums[i] += left[c] * right[c];
      }
    }
  }

  C sum = sum_over_lanes(group, sums);
  int spare_bits = lane_bits - DotBits;  // lanes that hold the same dot product
  int64_t j = first + (group.lane >> spare_bits);
  if (inside && j < k && (group.lane & ((1 << spare_bits) - 1)) == 0) out[n * k + j] = narrow<T>(sum);
}

// The same of a ragged code for D = 1: a thread an entry.
template <typename T>
__global__ void __launch_bounds__(kGatherBlock)
    sddmm_column(const T* x, const T* weight, const int64_t* indices, Tokens tokens, T* out, int64_t entries,
                 int64_t x_row, int64_t weight_row, int64_t index_stride) {
  int64_t i = int64_t(blockIdx.x) * kGatherBlock + threadIdx.x;
  if (i >= entries) return;
  Accumulator<T> product = 0;
  if (i < tokens.live(entries))
    product = widen(x[tokens.of(i) * x_row]) * widen(weight[indices[i * index_stride] * weight_row]);
  out[i] = narrow<T>(product);
}

}  // namespace fastsparse::cuda
