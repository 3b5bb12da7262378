// The gradient of the linear recurrence, against time: device code.
//
// What reaches the state before a step, a_t^T (d_h_t + what reaches the state after it), is affine in the latter: a scan
// (scan.cuh). On its way it leaves d_b_t = lambda_t, the sum in brackets, and d_a_t = lambda_t h_{t-1}^T.
//
// Bytes: a, h and d_h are read once, d_a and d_b are written once, 20 an element of fp32 and 56 a pair; where time is cut
// into segments a and d_h are read twice. At B=8, T=2048, H=1024 in fp32 that is .34 GB, 78 us at 4.3 TB/s.
#pragma once

#include "cuda/scan.cuh"

namespace fastsparse::cuda {

template <typename Type, int States> struct LinearBackSteps {
  using T = Type;
  using C = Accumulator<T>;
  static constexpr int kStates = States, kSums = 0, kBlocks = sizeof(T) == 8 ? 1 : 2;
  static constexpr int kHeld = States > 1 ? 2 : 32 / int(sizeof(C));
  struct Step { T a[States * States], before[States], gradient[States]; };
  using Line = cuda::Line<C, kSums>;

  const T* a;         // (B, T, H), or (B, T, 2, 2, H)
  const T* h0;        // (S, H), or (S, 2, H); or null: 0, and the first a wasn't read
  const T* h;         // (B, T, H), or (B, T, 2, H)
  const T* gradient;  // of h
  T* d_a;             // as a, or null: not needed
  T* d_b;             // as h, or null: not needed
  T* d_h0;            // as h0, or null: not needed

  __device__ __forceinline__ Step load(const Line& line, int64_t element, int64_t i) const {
    Step step{};
    const bool is_first = i + 1 == line.length;  // of the recurrence
    if (!is_first || d_h0) {
#pragma unroll
      for (int j = 0; j < States * States; ++j)
        step.a[j] = a[element * (States * States) + j * line.H + line.channel];
    }
#pragma unroll
    for (int j = 0; j < States; ++j) {
      step.gradient[j] = gradient[element * States + j * line.H + line.channel];
      if (!d_a) continue;
      if (!is_first) step.before[j] = h[(element + line.stride) * States + j * line.H + line.channel];
      else if (h0) step.before[j] = h0[(line.s * States + j) * line.H + line.channel];
    }
    return step;
  }

  __device__ __forceinline__ Affine<C, States> map(const Line&, const Step& step) const {
    Affine<C, States> map;
#pragma unroll
    for (int i = 0; i < States; ++i) {
      map.b[i] = 0;
#pragma unroll
      for (int j = 0; j < States; ++j) {
        map.A[i * States + j] = widen(step.a[j * States + i]);
        map.b[i] += map.A[i * States + j] * widen(step.gradient[j]);
      }
    }
    return map;
  }

  __device__ __forceinline__ void advance(const Line& line, const Step& step, C (&through)[States], int64_t element,
                                          bool kept) const {
    C lambda[States];
#pragma unroll
    for (int i = 0; i < States; ++i) lambda[i] = through[i] + widen(step.gradient[i]);
#pragma unroll
    for (int j = 0; j < States; ++j) {
      through[j] = 0;
#pragma unroll
      for (int i = 0; i < States; ++i) through[j] += widen(step.a[i * States + j]) * lambda[i];
    }
    if (!kept) return;
#pragma unroll
    for (int i = 0; i < States; ++i)
      if (d_b) d_b[element * States + i * line.H + line.channel] = narrow<T>(lambda[i]);
    if (!d_a) return;
    const bool unread = !h0 && element == line.element(line.length - 1);
#pragma unroll
    for (int i = 0; i < States; ++i)
#pragma unroll
      for (int j = 0; j < States; ++j)
        d_a[element * (States * States) + (i * States + j) * line.H + line.channel] =
            narrow<T>(unread ? C(0) : lambda[i] * widen(step.before[j]));
  }

  __device__ __forceinline__ void start(const Line&, C (&through)[States]) const {
#pragma unroll
    for (int j = 0; j < States; ++j) through[j] = 0;
  }

  __device__ __forceinline__ void finish(const Line& line, const C (&through)[States]) const {
#pragma unroll
    for (int j = 0; j < States; ++j)
      if (d_h0) d_h0[(line.s * States + j) * line.H + line.channel] = narrow<T>(through[j]);
  }
};

}  // namespace fastsparse::cuda
