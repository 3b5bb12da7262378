// Sigmoid and tanh on the device, as the steps of csrc/cells.h want them.
//
// In fp32 each is one exponential and one reciprocal of the special function unit, which are off by up to 2^-22 and
// 2^-23 of their values (PTX ISA, ex2.approx.ftz and rcp.approx.ftz), with two instructions around them: the chain from
// one state to the next is what a recurrence's time is made of. At worst sigmoid is off by 3 eps and tanh by 4, below
// 0.6 by 1 eps of its value. Of its own value sigmoid is off by 4 eps, and |x| / 2 eps, as much as rounding x costs.
// NaN stays NaN, nothing overflows, and infinities have their limits.
#pragma once

#include "cuda/device.cuh"

namespace fastsparse::cuda {

#ifdef FASTSPARSE_EMULATED
// As wrong as they may be, otherwise for every value.
inline float off_by(float most, float value) {
  uint32_t hash = __float_as_uint(value) * 2654435761u;
  return value * (1 + most * (float(hash >> 8) * 0x1p-23f - 1));
}
inline float exp2_approximately(float x) { return off_by(0x1p-22f, exp2f(x)); }
inline float reciprocal_approximately(float x) { return off_by(0x1p-23f, 1 / x); }
#else
__device__ __forceinline__ float exp2_approximately(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_approximately(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

// What csrc/cells.h computes with.
template <typename C> struct Math;

template <> struct Math<float> {
  using V = float;

  __device__ __forceinline__ static float sigmoid(float x) {
    return reciprocal_approximately(1 + exp2_approximately(-kLog2E * x));
  }

  // By exponentials 2 sigmoid(2 x) - 1, which cancels near 0; there x + x^3 p(x^2), the polynomial by a minimax fit.
  __device__ __forceinline__ static float tanh(float x) {
    float far = fmaf(2, reciprocal_approximately(1 + exp2_approximately(-2 * kLog2E * x)), -1);
    float square = x * x, p = -5.895157e-3f;
    p = fmaf(p, square, 2.0795971e-2f);
    p = fmaf(p, square, -5.3783830e-2f);
    p = fmaf(p, square, 1.3331924e-1f);
    p = fmaf(p, square, -3.3333299e-1f);
    return fabsf(x) < 0.6f ? fmaf(p * square, x, x) : far;
  }

 private:
  static constexpr float kLog2E = 1.44269504f;
};

template <> struct Math<double> {
  using V = double;

  __device__ __forceinline__ static double sigmoid(double x) { return 1 / (1 + exp(-x)); }
  __device__ __forceinline__ static double tanh(double x) { return ::tanh(x); }
};

}  // namespace fastsparse::cuda
