// The gradient of matching pursuit, back through its steps: device code.
//
// With w the atom of a step, c its coefficient, r the residual after it and g what reaches r, from the last step to the
// first (fastsparse/reference/matching_pursuit.py derives it; unit norms are s = 1 and r + c w in dw):
//   q = (gc - g.w) / s;   dw = q (r - c w) - c g;   r <- r + c w;   g <- g + q w
//
// pursuit_back gives a row to a block, which carries r and g in registers (in global memory where D is too large for
// that) and has the next step's atom on its way while this one's product is added up. What a step adds to its atom's
// gradient goes to a row of scratch memory. That is of bounded size, so tokens are taken in chunks. One sort, before
// all of them, brings every chunk's steps into the order of their atoms; pursuit_reduce then adds up each atom's rows
// in that order, and pursuit_join what it has cut into pieces. Nothing is atomic: the same call gives the same bits.
//
// Bytes: N k D elements of atoms gathered; N k D accumulators of scratch memory written and read once; N D elements of
// residuals and gradients. M D accumulators of d_dictionary are cleared, and a row of them read and written for every
// atom that a chunk of tokens has taken. At N=8192, D=768, k=32 in fp32 that is .8 GB each of atoms, writing and reading:
// 560 us at 4.3 TB/s where nothing stays in L2. Seven FLOPs an element.
#pragma once

#include "cuda/gather.cuh"
#include "cuda/select.cuh"

namespace fastsparse::cuda {

inline constexpr int kBackThreads = 512;  // at most
inline constexpr int kBackSteps = 32;     // whose terms are staged at a time

// How many accesses of Width columns a thread's registers hold: 16 columns of fp32 and halves, 8 of fp64 or where
// columns are read one by one.
template <typename T, int Width>
inline constexpr int kHeldPackets = Width == 1 ? 8 : sizeof(T) == 8 ? 4 : 16 / Width;

// Columns of the residual and of what reaches it.
template <typename C, int Width> struct alignas(2 * Width * sizeof(C) > 16 ? 16 : 2 * Width * sizeof(C)) Carried {
  C r[Width], g[Width];
};

// Tokens first, first + 1, ... as kernels take them; strides in elements.
template <typename T> struct Pursued {
  const T* values;
  const int64_t* indices;
  const T* d_values;
  const T* residual;
  const T* d_residual;    // or null: 0
  const T* dictionary;
  const double* squares;  // (M,) squared norms of the atoms, or null: all are 1
  T* d_x;                 // or null: not needed
  Accumulator<T>* contributions;  // (tokens, k, D), or null: not needed
  Carried<Accumulator<T>, 1>* carried;  // (tokens, D) where registers don't hold them
  int64_t first, k, D;
  int64_t value_row, value_column, index_row, index_column, d_value_row, d_value_column;
  int64_t residual_row, d_residual_row, dictionary_row;
};

template <typename C> struct StagedBack {
  double inverse[kBackSteps];
  int64_t offset[kBackSteps];
  C value[kBackSteps], d_value[kBackSteps];
  C part[2][kBackThreads / kWarp];
};

template <typename C, int Width> __device__ __forceinline__ void store_accumulators(C* address, const C (&from)[Width]) {
  if constexpr (Width == 1) {
    *address = from[0];
  } else {
    constexpr int size = Packet<C>::size;
#pragma unroll
    for (int begin = 0; begin < Width; begin += size) {
      Packet<C> packet;
#pragma unroll
      for (int c = 0; c < size; ++c) packet.value[c] = from[begin + c];
      store_packet(address + begin, packet);
    }
  }
}

// A block a token. Packets: kHeldPackets, or 0 for a token that is carried in global memory.
template <typename T, int Width, int Packets>
__global__ void __launch_bounds__(kBackThreads, 1) pursuit_back(Pursued<T> pursued) {
  using C = Accumulator<T>;
  constexpr int held = Packets > 0 ? Packets : 1;
  static_assert(Packets > 0 || Width == 1);
  auto& staged = shared_storage<StagedBack<C>>();
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  const int64_t D = pursued.D, row = blockIdx.x, n = pursued.first + row;
  Carried<C, Width> registers[held];
  Columns<T, Width> now[held] = {}, next[held] = {};

  // body(p, column, carried) for each access of the thread.
  auto each = [&](auto&& body) {
    if constexpr (Packets > 0) {
#pragma unroll
      for (int p = 0; p < Packets; ++p) {
        int64_t column = (int64_t(p) * threads + thread) * Width;
        if (column < D) body(p, column, registers[p]);
      }
    } else {
      for (int64_t column = thread; column < D; column += threads) body(0, column, pursued.carried[row * D + column]);
    }
  };
  auto fetch = [&](int64_t offset) {
    if constexpr (Packets > 0)
      each([&](int p, int64_t column, auto&) {
        next[p] = load_columns<T, Width>(pursued.dictionary + offset + column);
      });
  };

  each([&](int, int64_t column, Carried<C, Width>& carried) {
    widen_columns<T, Width>(load_columns<T, Width>(pursued.residual + n * pursued.residual_row + column), carried.r);
    if (pursued.d_residual) {
      widen_columns<T, Width>(load_columns<T, Width>(pursued.d_residual + n * pursued.d_residual_row + column),
                              carried.g);
    } else {
#pragma unroll
      for (int c = 0; c < Width; ++c) carried.g[c] = 0;
    }
  });

  int parity = 0;
  for (int64_t end = pursued.k; end > 0; end -= kBackSteps) {
    const int steps = end < kBackSteps ? int(end) : kBackSteps;
    __syncthreads();  // the steps before these have been taken
    for (int s = thread; s < steps; s += threads) {
      int64_t t = end - 1 - s;
      int64_t index = pursued.indices[n * pursued.index_row + t * pursued.index_column];
      staged.offset[s] = index * pursued.dictionary_row;
      staged.value[s] = widen(pursued.values[n * pursued.value_row + t * pursued.value_column]);
      staged.d_value[s] = widen(pursued.d_values[n * pursued.d_value_row + t * pursued.d_value_column]);
      if (pursued.squares) staged.inverse[s] = 1 / pursued.squares[index];
    }
    __syncthreads();
    fetch(staged.offset[0]);

    for (int s = 0; s < steps; ++s) {
      if constexpr (Packets > 0) {
#pragma unroll
        for (int p = 0; p < Packets; ++p) now[p] = next[p];
        if (s + 1 < steps) fetch(staged.offset[s + 1]);
      }
      const C value = staged.value[s];
      if (value == 0) continue;  // no step was taken
      const int64_t offset = staged.offset[s];
      auto atom = [&](int p, int64_t column, C (&w)[Width]) {
        if constexpr (Packets > 0) widen_columns<T, Width>(now[p], w);
        else widen_columns<T, Width>(load_columns<T, Width>(pursued.dictionary + offset + column), w);
      };

      C dot = 0;
      each([&](int p, int64_t column, Carried<C, Width>& carried) {
        C w[Width];
        atom(p, column, w);
#pragma unroll
        for (int c = 0; c < Width; ++c) dot += carried.g[c] * w[c];
      });
      dot = across_warp(dot, Sum{});
      if (threads > kWarp) {  // one barrier a step: the parts of two steps lie apart
        C* part = staged.part[parity];
        parity ^= 1;
        if (lane_index() == 0) part[warp_index()] = dot;
        __syncthreads();
        dot = part[0];
        for (int warp = 1; warp < threads / kWarp; ++warp) dot += part[warp];
      }
      C q = staged.d_value[s] - dot;
      if (pursued.squares) q = C(double(q) * staged.inverse[s]);

      each([&](int p, int64_t column, Carried<C, Width>& carried) {
        C w[Width], d_w[Width];
        atom(p, column, w);
#pragma unroll
        for (int c = 0; c < Width; ++c) {
          C step = value * w[c], before = carried.r[c] + step, g = carried.g[c];
          d_w[c] = q * (pursued.squares ? carried.r[c] - step : before) - value * g;
          carried.r[c] = before;
          carried.g[c] = g + q * w[c];
        }
        if (pursued.contributions)
          store_accumulators<C, Width>(pursued.contributions + (row * pursued.k + end - 1 - s) * D + column, d_w);
      });
    }
  }
  if (!pursued.d_x) return;
  each([&](int, int64_t column, Carried<C, Width>& carried) {
    store_columns<T, Width>(pursued.d_x + n * D + column, carried.g);
  });
}

// ---- from steps to atoms ----

// A step's key: its chunk of tokens, then its atom; M, behind all atoms, where no step was taken.
template <typename T, typename Word>
__global__ void __launch_bounds__(kGatherBlock)
    pursuit_pairs(const T* values, const int64_t* indices, Word* keys, Word* places, int64_t steps, int64_t k, int64_t M,
                  int64_t tokens, int atom_bits, int64_t value_row, int64_t value_column, int64_t index_row,
                  int64_t index_column) {
  int64_t i = int64_t(blockIdx.x) * kGatherBlock + threadIdx.x;
  if (i >= steps) return;
  int64_t n = quotient(i, k), t = i - n * k;
  int64_t atom = indices[n * index_row + t * index_column];
  bool taken = widen(values[n * value_row + t * value_column]) != 0 && uint64_t(atom) < uint64_t(M);
  keys[i] = Word(quotient(n, tokens)) << atom_bits | Word(taken ? atom : M);
  places[i] = Word(i);
}

// The steps of one chunk in the order of their atoms. Their list is cut into tiles, and an atom's steps where tiles end.
inline constexpr int kTileBits = 7;  // 128 steps: in flight 8 at a time, some 10 us

template <typename Word> struct Chunk {
  const Word* keys;
  const Word* places;
  int64_t begin, steps, M;  // begin: of its rows of scratch memory, among all steps
  int atom_bits;

  __device__ __forceinline__ int64_t atom(int64_t i) const {
    return int64_t(keys[i] & ((Word(1) << atom_bits) - 1));
  }
  __device__ __forceinline__ bool continues(int64_t i) const { return i > 0 && keys[i - 1] == keys[i]; }
};

// A group of lanes a place of the list and panel of columns: it works where a piece begins. A piece that continues an
// atom's steps goes to its tile's row of partial sums.
template <typename C, int Width, typename Word>
__global__ void __launch_bounds__(kGatherBlock, kGatherResident<C>)
    pursuit_reduce(Chunk<Word> chunk, const C* contributions, C* out, C* partials, int64_t D, unsigned panel_blocks,
                   int lane_bits) {
  constexpr int64_t tile = int64_t{1} << kTileBits;
  unsigned panel = blockIdx.x / panel_blocks;
  Group group(lane_bits, blockIdx.x - panel * panel_blocks);
  const int64_t begin = group.index;
  if (begin >= chunk.steps) return;
  bool continues = chunk.continues(begin);
  if (continues && begin % tile != 0) return;
  int64_t atom = chunk.atom(begin);
  if (atom >= chunk.M) return;

  int64_t limit = (begin | (tile - 1)) + 1, end = begin + 1;
  if (limit > chunk.steps) limit = chunk.steps;
  for (;; end += group.lanes) {
    int64_t i = end + group.lane;
    unsigned others = __ballot_sync(group.mask, i >= limit || chunk.keys[i] != chunk.keys[begin]) & group.mask;
    if (!others) continue;
    end += __ffs(int(others)) - __ffs(int(group.mask));
    break;
  }

  int64_t column = ((int64_t(panel) << lane_bits) + group.lane) * Width;
  bool inside = column < D;
  auto term = [&](int64_t i) { return Term<C>{(int64_t(chunk.places[begin + i]) - chunk.begin) * D, C(1)}; };
  C total[Width];
  gather_sum<C, Width>(group, end - begin, contributions, inside ? column : 0, term, total);
  if (!inside) return;
  if (continues) {
    store_columns<C, Width>(partials + (begin >> kTileBits) * D + column, total);
    return;
  }
  C sum[Width];
  widen_columns<C, Width>(load_columns<C, Width>(out + atom * D + column), sum);
#pragma unroll
  for (int c = 0; c < Width; ++c) sum[c] += total[c];
  store_columns<C, Width>(out + atom * D + column, sum);
}

// Adds the partial sums of every atom whose steps went on past a tile's end: block (tile, panel) works where the tile is
// the first that such an atom continues in.
template <typename C, typename Word>
__global__ void __launch_bounds__(kGatherBlock)
    pursuit_join(Chunk<Word> chunk, const C* partials, C* out, int64_t D, unsigned panels) {
  constexpr int64_t tile = int64_t{1} << kTileBits;
  int64_t place = (int64_t(blockIdx.x / panels) + 1) << kTileBits;
  if (!chunk.continues(place)) return;
  if (place > tile && chunk.keys[place - tile - 1] == chunk.keys[place]) return;  // nor is it the first
  int64_t atom = chunk.atom(place);
  int64_t column = int64_t(blockIdx.x % panels) * kGatherBlock + threadIdx.x;
  if (atom >= chunk.M || column >= D) return;
  const Word key = chunk.keys[place];
  C total = partials[(place >> kTileBits) * D + column];
#pragma unroll 4
  for (place += tile; place < chunk.steps && chunk.keys[place] == key; place += tile)
    total += partials[(place >> kTileBits) * D + column];
  out[atom * D + column] += total;
}

}  // namespace fastsparse::cuda
