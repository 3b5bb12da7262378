// out[n] = sum_j values[n, j] * weight[indices[n, j]]: device code.
//
// A group of lanes takes one token and one panel of columns, and keeps the panel's sums in registers over all k terms.
// Bytes: N k D elements gathered, N D written, and the code (8 bytes and a value an entry) once a panel: 2 % of the
// gathers in panels of 512 bytes, 8 % in panels of 128. Floor: at D=4096 in bf16 8 kB an entry, 1 ms for N=8192, k=64
// at 4.3 TB/s, less where L2 holds the panels. Two FLOPs an element: memory-bound everywhere.
//
// A ragged code's tokens are lists (lists.cuh): their entries are shared out, however many a token has.
#pragma once

#include "cuda/lists.cuh"
#include "cuda/ragged.cuh"

namespace fastsparse::cuda {

template <typename T, int Width>
__global__ void __launch_bounds__(kGatherBlock, kGatherResident<T>)
    spmm_gather(const T* values, const int64_t* indices, const T* weight, T* out, int64_t N, int64_t k, int64_t D,
                unsigned panel_blocks, int lane_bits, int64_t value_row, int64_t value_column, int64_t index_row,
                int64_t index_column, int64_t weight_row) {
  using C = Accumulator<T>;
  // Panel by panel, so that what is gathered at any time is one panel of the atoms, which L2 may hold.
  unsigned panel = blockIdx.x / panel_blocks;
  Group group(lane_bits, blockIdx.x - panel * panel_blocks);
  int64_t n = group.index, column = ((int64_t(panel) << lane_bits) + group.lane) * Width;
  if (n >= N) return;
  bool inside = column < D;
  const T* value = values + n * value_row;
  const int64_t* index = indices + n * index_row;
  C total[Width];
  gather_sum<T, Width>(
      group, k, weight, inside ? column : 0,
      [&](int64_t j) { return Term<C>{index[j * index_column] * weight_row, widen(value[j * value_column])}; }, total);
  if (inside) store_columns<T, Width>(out + n * D + column, total);
}

// Of a ragged code each entry's term, each token's range, each mark's token.
template <typename T>
__global__ void __launch_bounds__(kGatherBlock)
    spmm_lists(const T* values, const int64_t* indices, Tokens tokens, RowLists<Accumulator<T>> lists, int64_t entries,
               int64_t value_stride, int64_t index_stride, int64_t weight_row) {
  int64_t i = int64_t(blockIdx.x) * kGatherBlock + threadIdx.x;
  if (i < tokens.N) lists.ranges[i] = {tokens.bound(i, entries), tokens.bound(i + 1, entries)};
  if (i >= entries) return;
  lists.terms[i] = {indices[i * index_stride] * weight_row, widen(values[i * value_stride])};
  if (lists.marks_after(i)) lists.marked[lists.mark_after(i)] = tokens.of(i);
}

}  // namespace fastsparse::cuda
