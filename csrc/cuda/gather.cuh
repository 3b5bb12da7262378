// What the sparse products share: groups of lanes, rows read in wide accesses, the weighted sum of gathered rows.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/device.cuh"

namespace fastsparse::cuda {

inline constexpr int kGatherBlock = 128;  // threads
// Blocks a multiprocessor that gather_sum is compiled for: left to choose, the compiler saves registers by having half
// as many rows in flight. (At 6 a thread has 80 registers, of which 32 hold rows and 8 sums: 24 warps have 96 kB in
// flight, and 4 TB/s over 132 multiprocessors at 1 us of latency take 30 kB.)
template <typename T> inline constexpr int kGatherResident = sizeof(T) == 8 ? 4 : 6;
inline constexpr int kLeastLaneBits = 3;

// A whole number divided by a positive one; division of 64 bits takes some 100 instructions, of 32 about 20.
__device__ __forceinline__ int64_t quotient(int64_t dividend, int64_t divisor) {
  if ((dividend | divisor) >> 32) return dividend / divisor;
  return int64_t(uint32_t(dividend) / uint32_t(divisor));
}

// 2^lane_bits adjacent lanes of a warp, which work on one tile together; numbered through the blocks of one panel.
struct Group {
  int lanes, lane, in_block;
  unsigned mask;
  int64_t index;

  __device__ __forceinline__ Group(int lane_bits, unsigned block) {
    int thread = int(threadIdx.x);
    lanes = 1 << lane_bits;
    lane = thread & (lanes - 1);
    in_block = thread >> lane_bits;
    mask = (kAllLanes >> (kWarp - lanes)) << (thread & (kWarp - 1) & ~(lanes - 1));
    index = int64_t(block) * (int(blockDim.x) >> lane_bits) + in_block;
  }
};

// Width elements of a row, read in one access: a packet, or one element where rows don't lie on 16-byte boundaries.
template <typename T> struct Single { T value[1]; };
template <typename T, int Width> using Columns = std::conditional_t<Width == 1, Single<T>, Packet<T>>;

template <typename T, int Width> __device__ __forceinline__ Columns<T, Width> load_columns(const T* address) {
  if constexpr (Width == 1) return {{*address}};
  else return load_packet(address);
}

template <typename T, int Width>
__device__ __forceinline__ void store_columns(T* address, const Accumulator<T> (&total)[Width]) {
  Columns<T, Width> columns;
#pragma unroll
  for (int c = 0; c < Width; ++c) columns.value[c] = narrow<T>(total[c]);
  if constexpr (Width == 1) *address = columns.value[0];
  else store_packet(address, columns);
}

// All elements widened: halves by the word, which takes the compiler one instruction each, not two or three.
template <typename T, int Width>
__device__ __forceinline__ void widen_columns(const Columns<T, Width>& narrow, Accumulator<T> (&columns)[Width]) {
  if constexpr (sizeof(T) == 2 && Width > 1) {
#pragma unroll
    for (int w = 0; w < Width / 2; ++w) {
      uint32_t word;
      memcpy(&word, &narrow.value[2 * w], sizeof word);
      if constexpr (std::is_same_v<T, bf16>) {
        columns[2 * w] = __uint_as_float(word << 16);
        columns[2 * w + 1] = __uint_as_float(word & 0xffff0000u);
      } else {
        columns[2 * w] = widen(T{uint16_t(word)});
        columns[2 * w + 1] = widen(T{uint16_t(word >> 16)});
      }
    }
  } else {
#pragma unroll
    for (int c = 0; c < Width; ++c) columns[c] = widen(narrow.value[c]);
  }
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

// total = sum_i factor_i * matrix[offset_i + column...], Width columns, the terms added in order. Every lane of the
// group takes part, each with columns of its own; term(i) gives the terms.
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

    // Rows i, i + 1, ... of the staged terms, all asked for before the first is used; where Some, only those there are.
    int i = 0;
    auto add = [&]<int Rows, bool Some>() {
      Columns<T, Width> rows[Rows];
#pragma unroll
      for (int r = 0; r < Rows; ++r)
        if (!Some || i + r < terms) rows[r] = load_columns<T, Width>(base + staged[i + r].offset);
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        if (Some && i + r >= terms) break;
        C columns[Width], factor = staged[i + r].factor;
        widen_columns<T, Width>(rows[r], columns);
#pragma unroll
        for (int c = 0; c < Width; ++c) total[c] += factor * columns[c];
      }
      i += Rows;
    };
#pragma unroll 1
    while (i + ahead <= terms) add.template operator()<ahead, false>();
    if (i + ahead / 2 <= terms) add.template operator()<ahead / 2, false>();
    if (i < terms) add.template operator()<ahead / 2 - 1, true>();
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
  // Blocks that give every tile of one panel a group.
  unsigned blocks(int64_t tiles, int threads) const {
    int64_t groups = threads >> lane_bits;
    return unsigned((tiles + groups - 1) / groups);
  }
};

// How wide the panels of a matrix should be at most when all of one panel's work comes before the next one's. Where the
// matrix doesn't fit L2 and each row is gathered several times, a panel of columns that does fit is read from memory
// once: at D=4096, M=131072 in bf16 (1 GB of atoms) 64 columns are 16 MB. Half of a 50 MB L2 is counted on: where it
// has two halves, each keeps a copy of what its own multiprocessors read.
inline int most_lane_bits(int64_t uses, int64_t rows, int64_t row_bytes, int64_t access_bytes) {
  constexpr int64_t cache = int64_t{24} << 20;
  if (uses < 2 * rows || rows * row_bytes <= cache) return 5;
  for (int bits = 5; bits >= kLeastLaneBits; --bits)
    if (rows * (access_bytes << bits) <= cache) return bits;
  return 5;
}

}  // namespace fastsparse::cuda
