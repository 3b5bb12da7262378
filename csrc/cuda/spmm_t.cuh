// out[m] = sum of values[n, j] * x[n] over the entries with indices[n, j] = m, in the order of (n, j): device code.
//
// The code comes sorted by latent, so a latent's entries are a range: a list, which lists.cuh sums. What is sorted are
// pairs of a latent and a place. Padding of a ragged code, which has the last places, takes the last latent, and so
// stands behind all entries.
//
// Bytes: N k D elements of x gathered, from L2, as a panel of x is small and each row of it used k times; M D of out
// written. Floor: at D=4096, M=131072 in bf16 the 1 GB of out takes .25 ms at 4.3 TB/s, the gathers of N=8192, k=64,
// 4.3 GB, come on top at the speed of L2.
#pragma once

#include "cuda/lists.cuh"
#include "cuda/ragged.cuh"

namespace fastsparse::cuda {

// What is to be sorted, and every latent without entries. Word: an unsigned type that holds N k and M.
template <typename Word>
__global__ void __launch_bounds__(kGatherBlock)
    spmm_t_pairs(const int64_t* indices, Tokens tokens, Word* latents, Word* places, Range* ranges, int64_t nnz,
                 int64_t k, int64_t M, int64_t index_row, int64_t index_column) {
  int64_t i = int64_t(blockIdx.x) * kGatherBlock + threadIdx.x;
  if (i < M) ranges[i] = {0, 0};
  if (i >= nnz) return;
  int64_t n = quotient(i, k);
  latents[i] = Word(i < tokens.live(nnz) ? indices[n * index_row + (i - n * k) * index_column] : M - 1);
  places[i] = Word(i);
}

// From sorted pairs: each entry's term, each latent's range, each mark's latent.
template <typename T, typename Word>
__global__ void __launch_bounds__(kGatherBlock)
    spmm_t_terms(const Word* latents, const Word* places, const T* values, Tokens tokens,
                 RowLists<Accumulator<T>> lists, int64_t nnz, int64_t k, int64_t value_row, int64_t value_column,
                 int64_t x_row) {
  int64_t i = int64_t(blockIdx.x) * kGatherBlock + threadIdx.x;
  if (i >= nnz) return;
  int64_t latent = int64_t(latents[i]), live = tokens.live(nnz);
  // Unchecked, and out of range: at least nothing else is overwritten.
  if (uint64_t(latent) >= uint64_t(lists.count)) latent = 0;
  if (lists.marks_after(i)) lists.marked[lists.mark_after(i)] = latent;
  if (i >= live) return;
  int64_t place = int64_t(places[i]), n = quotient(place, k);
  lists.terms[i] = {tokens.of(n) * x_row, widen(values[n * value_row + (place - n * k) * value_column])};
  if (i == 0 || latents[i - 1] != latents[i]) lists.ranges[latent].begin = i;
  if (i == live - 1 || latents[i + 1] != latents[i]) lists.ranges[latent].end = i + 1;
}

}  // namespace fastsparse::cuda
