// The squared norm of every row of a matrix, in fp64, where the squares of all fp32 numbers fit: device code.
//
// A warp takes a row. Bytes: M D elements read. One fp64 operation an element, which even a GPU with a 64th of its speed
// in fp64 does in a tenth of the time that one step of matching pursuit takes.
#pragma once

#include "cuda/gather.cuh"
#include "cuda/select.cuh"

namespace fastsparse::cuda {

inline constexpr int kNormThreads = 256;

template <typename T, int Width>
__global__ void __launch_bounds__(kNormThreads)
    rows_squared_norms(const T* rows, double* squares, int64_t M, int64_t D, int64_t stride) {
  int64_t m = int64_t(blockIdx.x) * (kNormThreads / kWarp) + warp_index();
  if (m >= M) return;
  double total = 0;
#pragma unroll 4
  for (int64_t d = int64_t(lane_index()) * Width; d < D; d += kWarp * Width) {
    Columns<T, Width> columns = load_columns<T, Width>(rows + m * stride + d);
#pragma unroll
    for (int c = 0; c < Width; ++c) {
      double value = widen(columns.value[c]);
      total += value * value;
    }
  }
  total = across_warp(total, Sum{});
  if (lane_index() == 0) squares[m] = total;
}

}  // namespace fastsparse::cuda
