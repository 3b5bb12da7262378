// Which token the rows of a code are of. A code (N, k) has a row a token; a ragged one is of (E, 1) entries, of which
// those from offsets[n] up to offsets[n + 1] are token n's, and those after the last token's are padding.
#pragma once

#include "cuda/device.cuh"

namespace fastsparse::cuda {

struct Tokens {
  const int64_t* offsets;  // (N + 1), or null
  int64_t N;

  // The token of a row; of padding the last. Offsets that nobody checked give a wrong token, but none that isn't there.
  __device__ __forceinline__ int64_t of(int64_t row) const {
    if (!offsets) return row;
    int64_t low = 0, high = N - 1;
    while (low < high) {
      int64_t middle = (low + high + 1) >> 1;
      if (offsets[middle] <= row) low = middle;
      else high = middle - 1;
    }
    return low;
  }
  // Where token n begins among so many rows.
  __device__ __forceinline__ int64_t bound(int64_t n, int64_t rows) const {
    int64_t bound = offsets[n];
    return bound < 0 ? 0 : bound < rows ? bound : rows;
  }
  // How many of so many rows are no padding.
  __device__ __forceinline__ int64_t live(int64_t rows) const { return offsets ? bound(N, rows) : rows; }
};

}  // namespace fastsparse::cuda
