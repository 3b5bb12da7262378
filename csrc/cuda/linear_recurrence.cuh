// The linear recurrence h_t = a_t h_{t-1} + b_t of single channels, or of pairs: device code.
//
// Bytes: a and b are read once and h is written once, 12 an element of fp32 and 28 a pair; where time is cut into
// segments a and b are read twice, the second time mostly from L2, as so few lines are no more than it holds.
// At B=8, T=2048, H=1024 in fp32 that is .2 GB, 47 us at 4.3 TB/s. Of the three FLOPs and a few instructions an element
// no part of the machine is kept as busy.
#pragma once

#include "cuda/scan.cuh"

namespace fastsparse::cuda {

template <typename Type, int States> struct LinearSteps {
  using T = Type;
  using C = Accumulator<T>;
  static constexpr int kStates = States, kSums = 0, kBlocks = sizeof(T) == 8 ? 1 : 2;
  static constexpr int kHeld = 8 / States / (sizeof(T) == 8 ? 2 : 1);
  struct Step { T a[States * States], b[States]; };

  const T* a;   // (B, T, H), or (B, T, 2, 2, H)
  const T* b;   // (B, T, H), or (B, T, 2, H)
  const T* h0;  // (S, H), or (S, 2, H); or null: 0, and the first a isn't read
  T* h;

  __device__ __forceinline__ Step load(const Line<C, 0>& line, int64_t element, int64_t i) const {
    Step step{};
    if (i > 0 || h0) {
#pragma unroll
      for (int j = 0; j < States * States; ++j)
        step.a[j] = a[element * (States * States) + j * line.H + line.channel];
    }
#pragma unroll
    for (int j = 0; j < States; ++j) step.b[j] = b[element * States + j * line.H + line.channel];
    return step;
  }

  __device__ __forceinline__ Affine<C, States> map(const Line<C, 0>&, const Step& step) const {
    Affine<C, States> map;
#pragma unroll
    for (int j = 0; j < States * States; ++j) map.A[j] = widen(step.a[j]);
#pragma unroll
    for (int j = 0; j < States; ++j) map.b[j] = widen(step.b[j]);
    return map;
  }

  __device__ __forceinline__ void advance(const Line<C, 0>& line, const Step& step, C (&state)[States],
                                          int64_t element, bool kept) const {
    cuda::advance(state, map(line, step));
#pragma unroll
    for (int j = 0; j < States; ++j)
      if (kept) h[element * States + j * line.H + line.channel] = narrow<T>(state[j]);
  }

  __device__ __forceinline__ void start(const Line<C, 0>& line, C (&state)[States]) const {
#pragma unroll
    for (int j = 0; j < States; ++j)
      state[j] = h0 ? widen(h0[(line.s * States + j) * line.H + line.channel]) : C(0);
  }

  __device__ __forceinline__ void finish(const Line<C, 0>&, const C (&)[States]) const {}
};

}  // namespace fastsparse::cuda
