// Affine maps of the few states of a channel: what the steps of a recurrence are, and what they are joined into.
#pragma once

#include "cuda/device.cuh"

namespace fastsparse::cuda {

// x -> A x + b of a channel's states.
template <typename C, int n> struct Affine {
  C A[n * n], b[n];

  __device__ __forceinline__ static Affine identity() {
    Affine map;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      map.b[i] = 0;
#pragma unroll
      for (int j = 0; j < n; ++j) map.A[i * n + j] = i == j;
    }
    return map;
  }

  // Into out, which isn't x.
  __device__ __forceinline__ void apply(const C (&x)[n], C (&out)[n]) const {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      out[i] = b[i];
#pragma unroll
      for (int j = 0; j < n; ++j) out[i] += A[i * n + j] * x[j];
    }
  }

  // What first an earlier map and then this one make.
  __device__ __forceinline__ Affine after(const Affine& earlier) const {
    Affine both;
    apply(earlier.b, both.b);
    multiply(A, earlier.A, both.A);
    return both;
  }

  __device__ __forceinline__ static void multiply(const C (&left)[n * n], const C (&right)[n * n], C (&out)[n * n]) {
#pragma unroll
    for (int i = 0; i < n; ++i)
#pragma unroll
      for (int j = 0; j < n; ++j) {
        out[i * n + j] = left[i * n] * right[j];
#pragma unroll
        for (int k = 1; k < n; ++k) out[i * n + j] += left[i * n + k] * right[k * n + j];
      }
  }
};

// That of the lane so many below.
template <typename C, int N> __device__ __forceinline__ Affine<C, N> from_below(const Affine<C, N>& map, int lanes) {
  Affine<C, N> other;
#pragma unroll
  for (int i = 0; i < N * N; ++i) other.A[i] = __shfl_up_sync(kAllLanes, map.A[i], unsigned(lanes));
#pragma unroll
  for (int i = 0; i < N; ++i) other.b[i] = __shfl_up_sync(kAllLanes, map.b[i], unsigned(lanes));
  return other;
}

}  // namespace fastsparse::cuda
