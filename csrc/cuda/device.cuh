// The words that device code is written in: CUDA C++'s own, and a few more for what the test-only emulator
// (tests/cuda_emulation) has to know of. A .cuh file includes this and nothing of CUDA or of PyTorch.
#pragma once

#include <cstdint>

#include "dtype.h"

#ifdef FASTSPARSE_EMULATED
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace fastsparse::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

#ifndef FASTSPARSE_EMULATED

// The block's static shared memory of one type: every call for the same type in one kernel is the same memory.
template <typename T> __device__ __forceinline__ T& shared_storage() {
  __shared__ __align__(alignof(T) < 16 ? 16 : alignof(T)) unsigned char bytes[sizeof(T)];
  return *reinterpret_cast<T*>(bytes);
}

// The block's dynamic shared memory, as many bytes as the launch asked for; aligned to 16.
template <typename T> __device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char fastsparse_dynamic_shared[];
  return reinterpret_cast<T*>(fastsparse_dynamic_shared);
}

__device__ __forceinline__ float widen(bf16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }
__device__ __forceinline__ float widen(f16 value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }

// Rounded to nearest, ties to even.
template <typename T> __device__ __forceinline__ T narrow(Accumulator<T> value);
template <> __device__ __forceinline__ bf16 narrow<bf16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <> __device__ __forceinline__ f16 narrow<f16>(float value) { return {__half_as_ushort(__float2half_rn(value))}; }
template <> __device__ __forceinline__ float narrow<float>(float value) { return value; }
template <> __device__ __forceinline__ double narrow<double>(double value) { return value; }

// The emulator checks it.
__device__ __forceinline__ void assume_aligned_packet(const void*) {}

#endif

// As many elements as one 16-byte access moves.
template <typename T> struct alignas(16) Packet {
  static constexpr int size = 16 / int(sizeof(T));
  T value[size];
};

// One 16-byte access: the address must be a multiple of 16.
template <typename T> __device__ __forceinline__ Packet<T> load_packet(const T* address) {
  assume_aligned_packet(address);
  return *reinterpret_cast<const Packet<T>*>(address);
}
template <typename T> __device__ __forceinline__ void store_packet(T* address, const Packet<T>& packet) {
  assume_aligned_packet(address);
  *reinterpret_cast<Packet<T>*>(address) = packet;
}

}  // namespace fastsparse::cuda
