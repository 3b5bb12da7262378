// What the sparse products share: groups of lanes, rows read in wide accesses, the weighted sum of gathered rows.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/device.cuh"

namespace fastsparse::cuda {

inline constexpr int kGatherBlock = 128;  // threads
inline constexpr int kLeastLaneBits = 3;

// A whole number divided by a positive one; division of 64 bits takes some 100 instructions, of 32 about 20.
__device__ __forceinline__ int64_t quotient(int64_t dividend, int64_t divisor) {
  if ((dividend | divisor) >> 32) return dividend / divisor;
  return int64_t(uint32_t(dividend) / uint32_t(divisor));
}

// 2^lane_bits adjacent lanes of a warp, which work on one tile together. Groups are numbered through the whole grid.
struct Group {
  int lanes, lane, in_block;
  unsigned mask;
  int64_t index;

  __device__ __forceinline__ explicit Group(int lane_bits) {
    int thread = int(threadIdx.x);
    lanes = 1 << lane_bits;
    lane = thread & (lanes - 1);
    in_block = thread >> lane_bits;
    mask = (kAllLanes >> (kWarp - lanes)) << (thread & (kWarp - 1) & ~(lanes - 1));
    index = int64_t(blockIdx.x) * (int(blockDim.x) >> lane_bits) + in_block;
  }
};

// Reads Width elements in one access: a packet, or one element where rows don't lie on 16-byte boundaries.
template <typename T, int Width> __device__ __forceinline__ Packet<T> load_columns(const T* address) {
  static_assert(Width == Packet<T>::size || Width == 1);
  if constexpr (Width == 1) {
    Packet<T> packet;
    packet.value[0] = *address;
    return packet;
  } else {
    return load_packet(address);
  }
}

// The first Width elements, widened. Two bf16 of a word take one instruction each this way, three otherwise.
template <typename T, int Width>
__device__ __forceinline__ void widen_columns(const Packet<T>& packet, Accumulator<T> (&columns)[Width]) {
  if constexpr (std::is_same_v<T, bf16> && Width == Packet<T>::size) {
#pragma unroll
    for (int w = 0; w < Width / 2; ++w) {
      uint32_t word;
      memcpy(&word, &packet.value[2 * w], sizeof word);
      columns[2 * w] = __uint_as_float(word << 16);
      columns[2 * w + 1] = __uint_as_float(word & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int c = 0; c < Width; ++c) columns[c] = widen(packet.value[c]);
  }
}

template <typename T, int Width>
__device__ __forceinline__ void store_columns(T* address, const Accumulator<T> (&total)[Width]) {
  Packet<T> packet;
#pragma unroll
  for (int c = 0; c < Width; ++c) packet.value[c] = narrow<T>(total[c]);
  if constexpr (Width == 1) *address = packet.value[0];
  else store_packet(address, packet);
}

// One term of a sum of rows: where the row begins, in elements, and its factor.
template <typename C> struct alignas(16) Term {
  int64_t offset;
  C factor;
};

// The terms of each group that are up next, read once from global memory. (One place is left free, so that groups of a
// warp read from different banks.)
inline constexpr int kStaged = 32;
template <typename C> struct Staged {
  Term<C> terms[kGatherBlock >> kLeastLaneBits][kStaged + 1];
};

// total = sum_i factor_i * matrix[offset_i + column...], Width columns, the terms added in order. Every lane of the group
// takes part, each with columns of its own; term(i) gives the terms.
template <typename T, int Width, typename TermAt>
__device__ __forceinline__ void gather_sum(const Group& group, int64_t count, const T* matrix, int64_t column,
                                           const TermAt& term, Accumulator<T> (&total)[Width]) {
  using C = Accumulator<T>;
  constexpr int ahead = Width == 1 ? 16 : 8;  // rows in flight: 128 bytes a thread in packets
  Term<C>* staged = shared_storage<Staged<C>>().terms[group.in_block];
  const T* base = matrix + column;
#pragma unroll
  for (int c = 0; c < Width; ++c) total[c] = 0;

  for (int64_t first = 0; first < count; first += kStaged) {
    int terms = count - first < kStaged ? int(count - first) : kStaged;
    __syncwarp(group.mask);  // the terms before these have been used
    for (int i = group.lane; i < terms; i += group.lanes) staged[i] = term(first + i);
    __syncwarp(group.mask);

    auto add = [&](int i, const Packet<T>& row) {
      C columns[Width], factor = staged[i].factor;
      widen_columns<T, Width>(row, columns);
#pragma unroll
      for (int c = 0; c < Width; ++c) total[c] += factor * columns[c];
    };
    for (int i = 0; i < terms; i += ahead) {
      Packet<T> rows[ahead];
      if (i + ahead <= terms) {
#pragma unroll
        for (int r = 0; r < ahead; ++r) rows[r] = load_columns<T, Width>(base + staged[i + r].offset);
#pragma unroll
        for (int r = 0; r < ahead; ++r) add(i + r, rows[r]);
      } else {
#pragma unroll
        for (int r = 0; r < ahead; ++r)
          if (i + r < terms) rows[r] = load_columns<T, Width>(base + staged[i + r].offset);
#pragma unroll
        for (int r = 0; r < ahead; ++r)
          if (i + r < terms) add(i + r, rows[r]);
      }
    }
  }
}

// How a row of D columns is cut into panels, each the work of one group of lanes, of which each takes `width` columns.
struct Panels {
  int lane_bits;
  int64_t count;

  // As many lanes a group as can be without more than a fifth of them idling.
  static Panels of(int64_t D, int width, int most_lane_bits = 5) {
    int64_t accesses = (D + width - 1) / width;
    for (int bits = most_lane_bits;; --bits) {
      int64_t count = (accesses + (int64_t{1} << bits) - 1) >> bits;
      if (bits == kLeastLaneBits || 4 * (count << bits) <= 5 * accesses) return {bits, count};
    }
  }
  // Blocks that give every tile a group.
  unsigned blocks(int64_t tiles, int threads) const {
    int64_t groups = threads >> lane_bits;
    return unsigned((tiles + groups - 1) / groups);
  }
};

// How wide the panels of a matrix should be at most when all of one panel's work comes before the next one's. Where the
// matrix doesn't fit L2 and each row is gathered several times, a panel of columns that does fit is read from memory once:
// at D=4096, M=131072 in bf16 (1 GB of atoms) 64 columns are 16 MB. Half of a 50 MB L2 is counted on: its halves each keep
// a copy of what both halves' multiprocessors read.
inline int most_lane_bits(int64_t uses, int64_t rows, int64_t row_bytes, int64_t access_bytes) {
  constexpr int64_t cache = int64_t{24} << 20;
  if (uses < 2 * rows || rows * row_bytes <= cache) return 5;
  for (int bits = 5; bits >= kLeastLaneBits; --bits)
    if (rows * (access_bytes << bits) <= cache) return bits;
  return 5;
}

}  // namespace fastsparse::cuda
