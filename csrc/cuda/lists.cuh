// out[l] = sum of factor * rows[offset...] over the terms of list l, in their order: device code. spmm sums the rows of
// a ragged code so, spmm_t each latent's entries.
//
// All terms lie in one array, where a list is a range. A range is cut into pieces of 2^split_bits terms, counted from
// its own begin, each the work of a group of lanes on one panel of columns. A list of one piece (or none) goes straight
// to out; the pieces of a hot one go to rows of partial sums, which another kernel adds up in order.
//
// No piece needs to be searched for. A range [begin, end) has (end - begin - 1) >> split_bits pieces after its first,
// and at least as many multiples of 2^split_bits lie in (begin, end]: among the terms each multiple, a mark, stands for
// one of them. Its list is that of the term before the mark, and which piece it is follows from begin. A mark behind
// all lists is the last one's, where it stands for nothing.
//
// Bytes: D elements gathered a term, and D written a list; 16 bytes a term once a panel; for hot lists 4 D bytes of
// partial sums written and read again every 2^split_bits terms (2 % of bf16's gathers at 256). Two FLOPs an element.
#pragma once

#include "cuda/gather.cuh"

namespace fastsparse::cuda {

template <typename C> struct RowLists {
  Term<C>* terms;
  Range* ranges;    // of each list's terms
  int64_t* marked;  // each mark's list
  int64_t count, marks;
  int split_bits;

  // Whether a mark follows term i, and which.
  __device__ __forceinline__ bool marks_after(int64_t i) const {
    return ((i + 1) & ((int64_t{1} << split_bits) - 1)) == 0;
  }
  __device__ __forceinline__ int64_t mark_after(int64_t i) const { return ((i + 1) >> split_bits) - 1; }
};

// A piece of a list, and where its sum goes: a row of partial sums, or (-1) straight to out.
struct Piece { int64_t list, begin, end, partial; };

// Of `marks` + `count` pieces: first those that marks stand for, which are the long ones, then each list's first.
// Rows of partial sums: that of a mark is its number; a hot list's first piece takes row marks + (its first mark).
template <typename C> __device__ __forceinline__ Piece piece_at(const RowLists<C>& lists, int64_t number) {
  const int64_t most = int64_t{1} << lists.split_bits;
  bool first = number >= lists.marks;
  int64_t list = first ? number - lists.marks : lists.marked[number];
  Range range = lists.ranges[list];
  int64_t first_mark = range.begin >> lists.split_bits;
  int64_t begin = range.begin + (first ? 0 : (number - first_mark + 1) << lists.split_bits);
  int64_t end = begin + most < range.end ? begin + most : range.end;
  bool hot = range.end - range.begin > most;
  return {list, begin, end, !first ? number : hot ? lists.marks + first_mark : -1};
}

template <typename T, int Width>
__global__ void __launch_bounds__(kGatherBlock, kGatherResident<T>)
    lists_gather(RowLists<Accumulator<T>> lists, const T* rows, T* out, Accumulator<T>* partials, int64_t D,
                 unsigned panel_blocks, int lane_bits) {
  unsigned panel = blockIdx.x / panel_blocks;
  Group group(lane_bits, blockIdx.x - panel * panel_blocks);
  if (group.index >= lists.marks + lists.count) return;
  Piece piece = piece_at(lists, group.index);
  if (piece.partial >= 0 && piece.begin >= piece.end) return;  // a mark that stands for nothing
  int64_t column = ((int64_t(panel) << lane_bits) + group.lane) * Width;
  bool inside = column < D;
  Accumulator<T> total[Width];
  gather_sum<T, Width>(
      group, piece.end - piece.begin, rows, inside ? column : 0,
      [&](int64_t i) { return lists.terms[piece.begin + i]; }, total);
  if (!inside) return;
  if (piece.partial < 0) {
    store_columns<T, Width>(out + piece.list * D + column, total);
  } else {
#pragma unroll
    for (int c = 0; c < Width; ++c) partials[piece.partial * D + column + c] = total[c];
  }
}

// The same for D = 1, where lanes share out the terms instead of columns: lane l adds up terms l, l + lanes, ..., then
// lanes are added in a tree.
template <typename T>
__global__ void __launch_bounds__(kGatherBlock)
    lists_column(RowLists<Accumulator<T>> lists, const T* rows, T* out, Accumulator<T>* partials) {
  Group group(kLeastLaneBits, blockIdx.x);
  if (group.index >= lists.marks + lists.count) return;
  Piece piece = piece_at(lists, group.index);
  if (piece.partial >= 0 && piece.begin >= piece.end) return;
  Accumulator<T> total = 0;
#pragma unroll 4
  for (int64_t i = piece.begin + group.lane; i < piece.end; i += group.lanes) {
    Term<Accumulator<T>> term = lists.terms[i];
    total += term.factor * widen(rows[term.offset]);
  }
  for (int offset = group.lanes / 2; offset; offset /= 2) total += __shfl_xor_sync(group.mask, total, offset);
  if (group.lane != 0) return;
  if (piece.partial < 0) out[piece.list] = narrow<T>(total);
  else partials[piece.partial] = total;
}

// Adds up the partial sums of hot lists: block (mark, panel) works where the mark is a hot list's first. Most have
// nothing to do, so a block takes many columns.
inline constexpr int kJoined = 4;  // columns a thread

template <typename T>
__global__ void __launch_bounds__(kGatherBlock)
    lists_join(RowLists<Accumulator<T>> lists, const Accumulator<T>* partials, T* out, int64_t D, unsigned panels) {
  int64_t mark = blockIdx.x / panels;
  int64_t list = lists.marked[mark];
  Range range = lists.ranges[list];
  int64_t others = (range.end - range.begin - 1) >> lists.split_bits;
  if (others < 1 || range.begin >> lists.split_bits != mark) return;
  int64_t column = int64_t(blockIdx.x % panels) * (kJoined * kGatherBlock) + threadIdx.x;
  Accumulator<T> total[kJoined] = {};
  auto add = [&](int64_t row) {
#pragma unroll
    for (int c = 0; c < kJoined; ++c)
      if (column + c * kGatherBlock < D) total[c] += partials[row * D + column + c * kGatherBlock];
  };
  add(lists.marks + mark);
#pragma unroll 4
  for (int64_t i = 0; i < others; ++i) add(mark + i);
#pragma unroll
  for (int c = 0; c < kJoined; ++c)
    if (column + c * kGatherBlock < D) out[list * D + column + c * kGatherBlock] = narrow<T>(total[c]);
}

}  // namespace fastsparse::cuda
