// Where the sequences of a batch lie: device code.
#pragma once

#include "cuda/device.cuh"

namespace fastsparse::cuda {

// The steps of a sequence: `count` from row `first` on, of all rows of the batch, one after another.
struct Span { int64_t first, count; };

// bounds: null for T rows a sequence, or those of cu_seqlens in T rows. Nobody has checked them; the span is inside.
__device__ __forceinline__ Span span_of(const int64_t* bounds, int64_t s, int64_t T) {
  if (!bounds) return {s * T, T};
  int64_t first = min(max(bounds[s], int64_t{0}), T);
  return {first, min(max(bounds[s + 1], first), T) - first};
}

}  // namespace fastsparse::cuda
