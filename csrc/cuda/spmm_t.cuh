// out[m] = sum of values[n, j] * x[n] over the entries with indices[n, j] = m, in the order of (n, j): device code.
//
// The code comes sorted by latent, so a latent's entries are a range. A range is cut into pieces of 2^split_bits
// entries, counted from its own begin, each the work of a group of lanes on one panel of columns. A latent of one piece
// (or none) goes straight to out; the pieces of a hot one go to rows of partial sums, which another kernel adds up in
// order.
//
// No piece needs to be searched for. A range [begin, end) has (end - begin - 1) >> split_bits pieces after its first,
// and at least as many multiples of 2^split_bits lie in (begin, end]: in the sorted order each multiple, a mark, stands
// for one of them. Its latent is that of the entry before the mark, and which piece it is follows from begin.
//
// Bytes: N k D elements of x gathered, from L2, as a panel of x is small and each row of it used k times; M D of out
// written; 16 bytes an entry once a panel; for hot latents 4 D bytes of partial sums written and read again every
// 2^split_bits entries (2 % of bf16's gathers at 256). Floor: at D=4096, M=131072 in bf16 the 1 GB of out takes .25 ms
// at 4.3 TB/s, the gathers of N=8192, k=64, 4.3 GB, come on top at the speed of L2. Two FLOPs an element.
#pragma once

#include "cuda/gather.cuh"

namespace fastsparse::cuda {

struct Entries { int64_t begin, end; };  // of a latent, in sorted order

// What is to be sorted, and every latent without entries. Word: an unsigned type that holds N k and M.
template <typename Word>
__global__ void __launch_bounds__(kGatherBlock)
    spmm_t_pairs(const int64_t* indices, Word* latents, Word* places, Entries* entries, int64_t nnz, int64_t k,
                 int64_t M, int64_t index_row, int64_t index_column) {
  int64_t i = int64_t(blockIdx.x) * kGatherBlock + threadIdx.x;
  if (i < M) entries[i] = {0, 0};
  if (i >= nnz) return;
  int64_t n = quotient(i, k);
  latents[i] = Word(indices[n * index_row + (i - n * k) * index_column]);
  places[i] = Word(i);
}

// From sorted pairs: each entry's term, each latent's range, each mark's latent.
template <typename T, typename Word>
__global__ void __launch_bounds__(kGatherBlock)
    spmm_t_terms(const Word* latents, const Word* places, const T* values, Term<Accumulator<T>>* terms,
                 Entries* entries, int64_t* marked, int64_t nnz, int64_t k, int64_t M, int split_bits,
                 int64_t value_row, int64_t value_column, int64_t x_row) {
  int64_t i = int64_t(blockIdx.x) * kGatherBlock + threadIdx.x;
  if (i >= nnz) return;
  int64_t place = int64_t(places[i]), n = quotient(place, k);
  terms[i] = {n * x_row, widen(values[n * value_row + (place - n * k) * value_column])};
  int64_t latent = int64_t(latents[i]);
  if (uint64_t(latent) >= uint64_t(M)) latent = 0;  // unchecked, and out of range: at least nothing else is overwritten
  if (i == 0 || latents[i - 1] != latents[i]) entries[latent].begin = i;
  if (i == nnz - 1 || latents[i + 1] != latents[i]) entries[latent].end = i + 1;
  int64_t next = i + 1;
  if ((next & ((int64_t{1} << split_bits) - 1)) == 0) marked[(next >> split_bits) - 1] = latent;
}

// A piece of a latent's entries, and where its sum goes: a row of partial sums, or (-1) straight to out.
struct Piece { int64_t latent, begin, end, partial; };

// Of `marks` + M pieces: first those that marks stand for, which are the long ones, then each latent's first.
// Rows of partial sums: that of a mark is its number; a hot latent's first piece takes row marks + (its first mark).
__device__ __forceinline__ Piece piece_at(int64_t number, const Entries* entries, const int64_t* marked, int64_t marks,
                                          int split_bits) {
  const int64_t most = int64_t{1} << split_bits;
  bool first = number >= marks;
  int64_t latent = first ? number - marks : marked[number];
  Entries range = entries[latent];
  int64_t first_mark = range.begin >> split_bits;
  int64_t begin = range.begin + (first ? 0 : (number - first_mark + 1) << split_bits);
  int64_t end = begin + most < range.end ? begin + most : range.end;
  bool hot = range.end - range.begin > most;
  return {latent, begin, end, !first ? number : hot ? marks + first_mark : -1};
}

template <typename T, int Width>
__global__ void __launch_bounds__(kGatherBlock, kGatherResident<T>)
    spmm_t_gather(const Term<Accumulator<T>>* terms, const Entries* entries, const int64_t* marked, const T* x, T* out,
                  Accumulator<T>* partials, int64_t M, int64_t D, int64_t marks, unsigned panel_blocks, int lane_bits,
                  int split_bits) {
  unsigned panel = blockIdx.x / panel_blocks;
  Group group(lane_bits, blockIdx.x - panel * panel_blocks);
  if (group.index >= marks + M) return;
  Piece piece = piece_at(group.index, entries, marked, marks, split_bits);
  if (piece.partial >= 0 && piece.begin >= piece.end) return;  // a mark that stands for nothing
  int64_t column = ((int64_t(panel) << lane_bits) + group.lane) * Width;
  bool inside = column < D;
  Accumulator<T> total[Width];
  gather_sum<T, Width>(
      group, piece.end - piece.begin, x, inside ? column : 0, [&](int64_t i) { return terms[piece.begin + i]; }, total);
  if (!inside) return;
  if (piece.partial < 0) {
    store_columns<T, Width>(out + piece.latent * D + column, total);
  } else {
#pragma unroll
    for (int c = 0; c < Width; ++c) partials[piece.partial * D + column + c] = total[c];
  }
}

// The same for D = 1, where lanes share out the entries instead of columns: lane l adds up entries l, l + lanes, ...,
// then lanes are added in a tree.
template <typename T>
__global__ void __launch_bounds__(kGatherBlock)
    spmm_t_column(const Term<Accumulator<T>>* terms, const Entries* entries, const int64_t* marked, const T* x, T* out,
                  Accumulator<T>* partials, int64_t M, int64_t marks, int split_bits) {
  Group group(kLeastLaneBits, blockIdx.x);
  if (group.index >= marks + M) return;
  Piece piece = piece_at(group.index, entries, marked, marks, split_bits);
  if (piece.partial >= 0 && piece.begin >= piece.end) return;
  Accumulator<T> total = 0;
#pragma unroll 4
  for (int64_t i = piece.begin + group.lane; i < piece.end; i += group.lanes) {
    Term<Accumulator<T>> term = terms[i];
    total += term.factor * widen(x[term.offset]);
  }
  for (int offset = group.lanes / 2; offset; offset /= 2) total += __shfl_xor_sync(group.mask, total, offset);
  if (group.lane != 0) return;
  if (piece.partial < 0) out[piece.latent] = narrow<T>(total);
  else partials[piece.partial] = total;
}

// Adds up the partial sums of hot latents: block (mark, panel) works where the mark is a hot latent's first. Most have
// nothing to do, so a block takes many columns.
inline constexpr int kJoined = 4;  // columns a thread

template <typename T>
__global__ void __launch_bounds__(kGatherBlock)
    spmm_t_join(const Accumulator<T>* partials, const Entries* entries, const int64_t* marked, T* out, int64_t D,
                int64_t marks, unsigned panels, int split_bits) {
  int64_t mark = blockIdx.x / panels;
  int64_t latent = marked[mark];
  Entries range = entries[latent];
  int64_t others = (range.end - range.begin - 1) >> split_bits;
  if (others < 1 || range.begin >> split_bits != mark) return;
  int64_t column = int64_t(blockIdx.x % panels) * (kJoined * kGatherBlock) + threadIdx.x;
  Accumulator<T> total[kJoined] = {};
  auto add = [&](int64_t row) {
#pragma unroll
    for (int c = 0; c < kJoined; ++c)
      if (column + c * kGatherBlock < D) total[c] += partials[row * D + column + c * kGatherBlock];
  };
  add(marks + mark);
#pragma unroll 4
  for (int64_t i = 0; i < others; ++i) add(mark + i);
#pragma unroll
  for (int c = 0; c < kJoined; ++c)
    if (column + c * kGatherBlock < D) out[latent * D + column + c * kGatherBlock] = narrow<T>(total[c]);
}

}  // namespace fastsparse::cuda
