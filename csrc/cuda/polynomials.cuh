// Polynomial activations of rows, and their gradients: device code.
//
// A warp takes a row, and goes through it twice: once for its sums, once for what is made of them, then out of a cache.
// Bytes: x is read, y is written, 8 an element of fp32; backward x and d_y are read, d_x is written, 12 an element. At
// (8192, 2048) in fp32 that is .13 and .20 GB, 31 and 47 us at 4.3 TB/s.
#pragma once

#include "cuda/gather.cuh"
#include "cuda/select.cuh"
#include "powers.h"

namespace fastsparse::cuda {

inline constexpr int kPolynomialThreads = 256;
inline constexpr int kPolynomialWarps = kPolynomialThreads / kWarp;
inline constexpr int kPolynomialRows = 32;  // of a block, a few for each of its warps

template <typename T> struct PolynomialRows {
  using C = Accumulator<T>;
  const T *x, *d_y;  // (N) rows x_stride and d_y_stride apart
  const T *weight, *bias;
  T* out;   // (N, D): y, or d_x, or null
  C* sums;  // (blocks, 4): what comes to weights and bias, or null
  int64_t N, D, x_stride, d_y_stride;
  C eps, inverse_D;
};

// Calls f(column, x[Width], g[Width]) for what a lane has of a row; g is 0 of no d_y.
template <int Width, typename T, typename F>
__device__ __forceinline__ void for_columns(const PolynomialRows<T>& rows, int64_t row, const F& f) {
  using C = Accumulator<T>;
#pragma unroll 4
  for (int64_t d = int64_t(lane_index()) * Width; d < rows.D; d += kWarp * Width) {
    C x[Width], g[Width] = {};
    widen_columns<T, Width>(load_columns<T, Width>(rows.x + row * rows.x_stride + d), x);
    if (rows.d_y) widen_columns<T, Width>(load_columns<T, Width>(rows.d_y + row * rows.d_y_stride + d), g);
    f(d, x, g);
  }
}

// One over the root of a mean square, without a division: one calls a subroutine, around which registers are spilled.
template <typename T> __device__ __forceinline__ Accumulator<T> inverse_root(Accumulator<T> squares,
                                                                             const PolynomialRows<T>& rows) {
  return rsqrt(squares * rows.inverse_D + rows.eps);
}

template <typename T, typename Kind, int Width>
__global__ void __launch_bounds__(kPolynomialThreads) polynomial_forward(PolynomialRows<T> rows) {
  using C = Accumulator<T>;
  const int64_t row = int64_t(blockIdx.x) * kPolynomialWarps + warp_index();
  if (row >= rows.N) return;
  C k[kPowers];
#pragma unroll
  for (int p = 0; p < kPowers; ++p) k[p] = widen(rows.weight[p]);
  if constexpr (Kind::kNormed) {
    PolynomialSums<C> sums{};
    for_columns<Width>(rows, row, [&](int64_t, const C (&x)[Width], const C (&)[Width]) {
#pragma unroll
      for (int i = 0; i < Width; ++i) sums.add_squares(x[i]);
    });
#pragma unroll
    for (int p = 0; p < kPowers; ++p) k[p] *= inverse_root(across_warp(sums.squares[p], Sum{}), rows);
  }
  const C bias = widen(*rows.bias);
  for_columns<Width>(rows, row, [&](int64_t d, const C (&x)[Width], const C (&)[Width]) {
    C y[Width];
#pragma unroll
    for (int i = 0; i < Width; ++i) y[i] = weighted_powers(Kind::base(x[i]), k, bias);
    store_columns<T, Width>(rows.out + row * rows.D + d, y);
  });
}

template <typename T, typename Kind, int Width>  // 2 blocks: left to itself the compiler spills to have more
__global__ void __launch_bounds__(kPolynomialThreads, 2) polynomial_back(PolynomialRows<T> rows) {
  using C = Accumulator<T>;
  struct Shared { C total[kPolynomialWarps][kPowers + 1]; };
  auto& shared = shared_storage<Shared>();
  C total[kPowers + 1] = {};
  for (int r = warp_index(); r < kPolynomialRows; r += kPolynomialWarps) {
    const int64_t row = int64_t(blockIdx.x) * kPolynomialRows + r;
    if (row >= rows.N) break;
    C k[kPowers], w[kPowers] = {};
#pragma unroll
    for (int p = 0; p < kPowers; ++p) k[p] = widen(rows.weight[p]);
    if (Kind::kNormed || rows.sums) {
      PolynomialSums<C> sums{};
      for_columns<Width>(rows, row, [&](int64_t, const C (&x)[Width], const C (&g)[Width]) {
#pragma unroll
        for (int i = 0; i < Width; ++i) {
          const C base = Kind::base(x[i]);
          if constexpr (Kind::kNormed) sums.add_squares(base);
          sums.add_products(base, g[i]);
        }
      });
#pragma unroll
      for (int p = 0; p < kPowers; ++p) {
        C product = across_warp(sums.products[p], Sum{});
        if constexpr (Kind::kNormed) {
          const C s = inverse_root(across_warp(sums.squares[p], Sum{}), rows);
          product *= s;
          k[p] *= s;
          w[p] = s * (product * rows.inverse_D);
        }
        total[p] += product;
      }
      total[kPowers] += across_warp(sums.products[kPowers], Sum{});
    }
    if (!rows.out) continue;
    for_columns<Width>(rows, row, [&](int64_t d, const C (&x)[Width], const C (&g)[Width]) {
      C d_x[Width];
#pragma unroll
      for (int i = 0; i < Width; ++i) d_x[i] = Kind::back(x[i], g[i], k, w);
      store_columns<T, Width>(rows.out + row * rows.D + d, d_x);
    });
  }
  if (!rows.sums) return;
  if (lane_index() == 0) {
#pragma unroll
    for (int p = 0; p <= kPowers; ++p) shared.total[warp_index()][p] = total[p];
  }
  __syncthreads();
  if (int(threadIdx.x) > kPowers) return;
  C sum = 0;
  for (int warp = 0; warp < kPolynomialWarps; ++warp) sum += shared.total[warp][threadIdx.x];
  rows.sums[int64_t(blockIdx.x) * (kPowers + 1) + threadIdx.x] = sum;
}

// The sums of all blocks, in one order, by one block of kPowers + 1 warps.
template <typename T>
__global__ void __launch_bounds__(kWarp * (kPowers + 1))
    polynomial_parameters(const Accumulator<T>* sums, T* d_weight, T* d_bias, int64_t blocks) {
  const int p = warp_index();
  double total = 0;
  for (int64_t block = lane_index(); block < blocks; block += kWarp) total += double(sums[block * (kPowers + 1) + p]);
  total = across_warp(total, Sum{});
  if (lane_index() == 0) *(p < kPowers ? d_weight + p : d_bias) = narrow<T>(Accumulator<T>(total));
}

}  // namespace fastsparse::cuda
