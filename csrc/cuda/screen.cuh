// topk_encode of fp32 through a product of bf16: screen, certify, refine (METHODS.md 1).
//
// Error bracket. With x = x~ + dx, w = w~ + dw, their bf16 roundings x~ and w~, X = |x~|, W = |w~|, by Cauchy-Schwarz
//   |x.w - x~.w~|              <= |dx| W + (X + |dx|) |dw|
//   the product's accumulation <= g X W                    with g = (a D + 8) 2^-24, see tensor_cores.cu
//   the exact score's own      <= h (X + |dx|)(W + |dw|)   with h = (D / 32 + 16) 2^-24, see `dot`
// which sums to A W + B |dw| with A = |dx| + g X + h (X + |dx|) and B = (1 + h)(X + |dx|). Subnormals that get flushed,
// and the bias's rounding, go into `rest`. Inf and NaN in any of these widen the bracket to everything, and so do norms
// beyond kMostNorm: no sum of the product, nor what scale and bias make of it, leaves fp32's range otherwise, on whatever
// way to a finite score.
//
// Bytes beside the product's, for N=8192, D=4096, M=131072: the atoms are rounded once a block of rows, 2 GB read,
// 0.5 ms; the filter is as for exact scores. Some 140 survivors a row then gather 16 kB each, 19 GB: 4.4 ms at
// 4.3 TB/s. They are far fewer than the brackets leave: the k latents with the best lower bounds are scored first, and
// the least of their exact keys drops most of the others. (Counted on Gaussian data, M=16384: 43 a row at D=768, k=32;
// 101 at D=2048, k=64; 137 at D=4096, k=64.)
#pragma once

#include <cfloat>

#include "cuda/tensor_cores.cuh"
#include "cuda/topk_encode.cuh"

namespace fastsparse::cuda {

inline constexpr float kMostNorm = 0x1p63f;  // whose square is a quarter of the largest number
inline constexpr int kRoundThreads = 256, kRefineThreads = 256;
inline constexpr int kRoundGroup = kRoundThreads / kWarp;  // latents that share the maxima of their terms

// ---- bf16 copies ----

struct Norms {
  float norm, residual;  // |rounded row|, |row - rounded row|, not less than they are

  __device__ __forceinline__ bool tame() const { return norm <= kMostNorm && residual <= kMostNorm; }
};

// Four elements from d on, zeros past the row's end.
__device__ __forceinline__ Packet<float> load_four(const float* row, int64_t d, int64_t D, bool packets) {
  if (packets && d < D) return load_packet(row + d);
  Packet<float> four;
#pragma unroll
  for (int e = 0; e < 4; ++e) four.value[e] = d + e < D ? row[d + e] : 0.0f;
  return four;
}

// Rounds a row into `padded` bf16, a multiple of 8. By a warp; `packets`: the row is whole packets on 16 bytes.
__device__ __forceinline__ Norms round_row(const float* row, int64_t D, bool packets, bf16* rounded, int64_t padded) {
  float norm = 0, residual = 0;
#pragma unroll 4
  for (int64_t d = lane_index() * 8; d < padded; d += kWarp * 8) {
    Packet<float> halves[2] = {load_four(row, d, D, packets), load_four(row, d + 4, D, packets)};
    Packet<bf16> out;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      float exact = halves[e / 4].value[e % 4];
      out.value[e] = narrow<bf16>(exact);
      float near = widen(out.value[e]), gap = exact - near;
      norm += near * near;
      residual += gap * gap;
    }
    store_packet(rounded + d, out);
  }
  double wide_norm = across_warp(norm, Sum()), wide_residual = across_warp(residual, Sum());
  if (!(wide_norm > 1e-25 && wide_norm < 1e30)) {  // squares may have left fp32's range
    wide_norm = wide_residual = 0;
    for (int64_t d = lane_index(); d < D; d += kWarp) {
      double near = widen(narrow<bf16>(row[d])), gap = double(row[d]) - near;
      wide_norm += near * near;
      wide_residual += gap * gap;
    }
    wide_norm = across_warp(wide_norm, Sum());
    wide_residual = across_warp(wide_residual, Sum());
  }
  // Sums of D fp32 squares are good to D 2^-24 relatively, and each square to 2^-149 absolutely.
  double safety = 1 + double(D) * 0x1p-23, lost = double(D) * 0x1p-149;
  return {float(sqrt(wide_norm + lost) * safety), float(sqrt(wide_residual + lost) * safety)};
}

__global__ void __launch_bounds__(kRoundThreads)
    topk_encode_round_tokens(const float* x, int64_t stride, int64_t rows, int64_t D, bool packets, bf16* rounded,
                             int64_t padded, Norms* norms, int32_t* undecided) {
  if (blockIdx.x == 0 && threadIdx.x < 2) undecided[threadIdx.x] = 0;
  int64_t row = int64_t(blockIdx.x) * kRoundGroup + warp_index();
  if (row >= rows) return;
  Norms of = round_row(x + row * stride, D, packets, rounded + row * padded, padded);
  if (lane_index() == 0) norms[row] = of;
}

// What a latent adds to a bracket, times |scale|; `lost` is how far rows may be off for being subnormal.
struct Terms {
  float norm = 0;      // |w~|
  float residual = 0;  // |w - w~| + tiny
  float rest = 0;      // the bias's rounding + tiny

  Terms() = default;
  __device__ __forceinline__ Terms(Norms of, const Latents<float>& latents, int64_t m, int64_t D, float lost) {
    if (latents.eligible && !latents.eligible[m]) return;
    float factor = latents.scale ? fabsf(latents.scale[m]) : 1.0f, bias = fabsf(latents.bias[m]);
    rest = (0x1p-20f * bias + lost * (of.norm + sqrtf(float(D)))) * factor;
    residual = (of.residual + lost) * factor;
    norm = of.norm * factor;
    if (!(of.norm <= kMostNorm && norm <= kMostNorm && bias <= kMostNorm * kMostNorm)) rest = INFINITY;
  }
};

// These of a stripe, padded with zeros to a whole group; and their maxima.
struct Brackets {
  float *norm, *residual, *rest;
  Packet<float>* most;   // of every kRoundGroup latents: norm, residual, rest; NaN, that all pass, where one isn't finite
};

// A block a group, a warp a latent.
__global__ void __launch_bounds__(kRoundThreads)
    topk_encode_round_atoms(const float* weight, int64_t stride, int64_t D, bool packets, int begin, int count,
                            Latents<float> latents, bf16* rounded, int64_t padded, Brackets brackets) {
  struct Storage {
    float terms[3][kRoundGroup];
  };
  auto& shared = shared_storage<Storage>();
  int m = int(blockIdx.x) * kRoundGroup + warp_index();
  Terms terms;
  if (m < count) {
    Norms of = round_row(weight + (begin + m) * stride, D, packets, rounded + m * padded, padded);
    terms = Terms(of, latents, begin + m, D, sqrtf(float(D)) * 0x1p-125f);
  }
  if (lane_index() == 0) {
    brackets.norm[m] = terms.norm;
    brackets.residual[m] = terms.residual;
    brackets.rest[m] = terms.rest;
    auto finite = [](float value) { return value <= FLT_MAX ? value : INFINITY; };
    shared.terms[0][warp_index()] = finite(terms.norm);
    shared.terms[1][warp_index()] = finite(terms.residual);
    shared.terms[2][warp_index()] = finite(terms.rest);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  Packet<float> most{};
  for (int term = 0; term < 3; ++term)
    for (int i = 0; i < kRoundGroup; ++i) most.value[term] = fmaxf(most.value[term], shared.terms[term][i]);
  for (float& term : most.value)
    if (!(term <= FLT_MAX)) term = NAN;
  store_packet(brackets.most[blockIdx.x].value, most);
}

// ---- the filter ----

// A row's brackets. In the lists stand upper bounds (as orders) and lower bounds.
template <bool Keyed> struct ScreenedRow {
  static constexpr int size = Packet<float>::size;
  ExactRow<float, Keyed> scored;
  const float* products;
  Brackets brackets;
  float a, b;

  __device__ __forceinline__ ScreenedRow(const ExactRow<float, Keyed>& scored, const Brackets& brackets, float a,
                                         float b)
      : scored(scored), products(scored.products), brackets(brackets), a(a), b(b) {}
  __device__ __forceinline__ ScreenedRow(const ExactRow<float, Keyed>& scored, const Brackets& brackets, Norms token,
                                         int64_t D, float g)
      : scored(scored), products(scored.products), brackets(brackets) {
    constexpr float safety = 1.001f;  // for the rounding of the bracket itself
    float h = float(D / 32 + 16) * 0x1p-24f;
    a = safety * (token.residual + g * token.norm + h * (token.norm + token.residual));
    b = safety * (token.norm + token.residual) * (1 + h);
  }
  __device__ __forceinline__ bool may_pass(Packet<float> scores, int v, float bound) const {
    static_assert(kRoundGroup % size == 0, "a packet's latents share their maxima");
    Packet<float> most = load_packet(brackets.most[v / kRoundGroup].value);
    return scored.may_pass(scores, v, bound - (a * most.value[0] + (b * most.value[1] + most.value[2])));
  }
  __device__ __forceinline__ Offers<float> offers(int v) const {
    Packet<float> scores = load_packet(products + v), keys = scored.keys(scores, v);
    Packet<float> norm = load_packet(brackets.norm + v), residual = load_packet(brackets.residual + v),
                  rest = load_packet(brackets.rest + v);
    Offers<float> offers;
#pragma unroll
    for (int e = 0; e < size; ++e) {
      float error = a * norm.value[e] + (b * residual.value[e] + rest.value[e]), lower = keys.value[e] - error;
      offers.first[e] = scored.eligible(v + e) ? order_of(keys.value[e] + error) : 0;
      offers.second[e] = lower == lower ? lower : -INFINITY;
    }
    return offers;
  }
  // Raises the threshold by the lower bounds and drops who can't reach it. The k-th largest lower bound can itself be
  // among the k best, so it stays above the threshold.
  __device__ __forceinline__ bool make_room(List<float>& list) const {
    __syncwarp();
    auto order = [&](int i) { return order_of(list.second(i)); };
    uint32_t bound = bound_of_list<uint32_t>(scored.k, list.count, order).order;
    keep_reaching(list, bound, list.count);
    list.threshold = Most()(list.threshold, bound - 1);
    if (list.count <= list.lists.capacity - Most()(kGroup<float>, list.lists.capacity / 4)) return true;
    list.count = kHopeless;
    return false;
  }
};

template <bool Keyed>
__global__ void __launch_bounds__(kFilterThreads, Keyed ? 6 : 7)
    topk_encode_screen(Lists<float> lists, Stripe<float> stripe, Latents<float> latents, Brackets brackets,
                       const Norms* tokens, int64_t D, float g, int rows, int splits) {
  Share share(splits, stripe.count, kGroup<float>);
  if (share.row >= rows) return;
  List<float> list(lists, share.list);
  if (stripe.begin > 0) list.resume();
  Norms token = tokens[share.row];
  if (!token.tame()) list.count = kHopeless;
  if (list.count != kHopeless) {
    ScreenedRow<Keyed> row(ExactRow<float, Keyed>(lists, stripe, latents, share.row), brackets, token, D, g);
    scan<float>(row, list, share.begin, share.end, stripe.begin);
  }
  list.suspend();
}

// ---- exact scores of the survivors ----

// Rows of fp32 for exact scores.
struct Rows {
  const float* x;
  const float* weight;
  int64_t x_stride, weight_stride, D;
  bool packets;  // all rows are whole packets on 16 bytes
};

// x.w by a warp, token in shared memory. A lane adds D / 128 (D / 32) products to each of its sums, then they are
// joined in seven (five) steps: an error of at most (D / 32 + 8) 2^-24 |x||w|.
__device__ __forceinline__ float dot(const float* token, const float* atom, int64_t D, bool packets) {
  Packet<float> sums{};
  if (packets) {
#pragma unroll 8
    for (int64_t d = lane_index() * 4; d < D; d += kWarp * 4) {
      Packet<float> w = load_packet(atom + d), x = load_packet(token + d);
#pragma unroll
      for (int e = 0; e < 4; ++e) sums.value[e] += x.value[e] * w.value[e];
    }
  } else {
#pragma unroll 8
    for (int64_t d = lane_index(); d < D; d += kWarp) sums.value[0] += token[d] * atom[d];
  }
  return across_warp((sums.value[0] + sums.value[1]) + (sums.value[2] + sums.value[3]), Sum());
}

// Turns the brackets of a row's candidates into exact orders and scores, or into order 0 where even the upper bound is
// below the k-th best. By all threads of a block; the token goes into dynamic shared memory.
__device__ __forceinline__ void refine_row(const Entries<float>& entries, const Rows& rows, int64_t row,
                                           const Latents<float>& latents) {
  auto& scratch = shared_storage<BlockScratch>();
  const Lists<float>& lists = entries.lists;
  float* token = dynamic_shared<float>();
  const float* source = rows.x + row * rows.x_stride;
  for (int64_t d = threadIdx.x; d < rows.D; d += kRefineThreads) token[d] = source[d];

  auto score = [&](int64_t at, int32_t latent) {
    float exact = dot(token, rows.weight + latent * rows.weight_stride, rows.D, rows.packets) + latents.bias[latent];
    float key = latents.scale ? exact * latents.scale[latent] : exact;
    uint32_t order = order_of(latents.absolute ? fabsf(key) : key);
    if (lane_index() == 0) {
      lists.first[at] = order;
      lists.second[at] = exact;
    }
    return order;
  };
  auto each = [&](const auto& visit) { entries.each(warp_index(), kRefineThreads / kWarp, visit); };

  // The k with the best lower bounds first. Their latents are marked, by their complement, until the others are done.
  auto lower = [&](int64_t at) { return order_of(lists.second[at]); };
  uint32_t bound = bound_of_entries<uint32_t>(scratch, entries, lists.k, lower).order, least = kNan<float>;
  each([&](int64_t at) {
    int32_t latent = lists.latent[at];
    if (lower(at) < bound) return;
    __syncwarp();  // all lanes have read before one writes
    least = Least()(least, score(at, latent));
    if (lane_index() == 0) lists.latent[at] = ~latent;
  });
  least = across_block(scratch, least, Least());
  each([&](int64_t at) {
    int32_t latent = lists.latent[at];
    uint32_t upper = lists.first[at];
    __syncwarp();
    if (latent >= 0 && upper >= least) score(at, latent);
    else if (lane_index() != 0) return;
    else if (latent < 0) lists.latent[at] = ~latent;
    else lists.first[at] = 0;
  });
}

__global__ void __launch_bounds__(kRefineThreads, 2)
    topk_encode_refine(Lists<float> lists, int splits, Rows rows, Latents<float> latents) {
  Entries<float> entries{lists, int64_t(blockIdx.x) * splits, splits};
  if (!entries.hopeless()) refine_row(entries, rows, blockIdx.x, latents);
}

// ---- the rows that the screen can't decide ----
//
// They are not known to the host: launches are for all rows, and blocks without work leave at once. So the vendor's
// library, whose products are as large as the host says, has no part in what follows. A block takes 64 rows and all
// latents, or a part of them where there are few such rows, 128 of them at a time.
//
// A second screen comes first, some 100 times closer. With x = x~ + x^ + dx, w = w~ + w^ + dw, where x^ and w^
// are, in bf16, what the first rounding leaves,
//   |x.w - (x~.w~ + x^.w~ + x~.w^)| <= |x^||w^| + |dx||w| + (|x| + |dx|)|dw|,  |dx| <= 2^-9 |x - x~|, |dw| likewise
//   the product's accumulation      <= 1.02 g |x||w|  with g = (48 a + 8 + D / 16) 2^-24: of 16 columns the tensor
// cores add three products each to 0, whose errors (tensor_cores.cu) sum up like the whole's, by Cauchy and Schwarz; D /
// 16 such sums are added in fp32; 1.02 is for three products being larger than one. With h for the exact score's own, as
// above, that is a bracket A |w| + B |w - w~| with A = 2^-9 |x - x~| + (g + h) |x| and B = |x - x~| + 2^-9 |x|.
//
// Rows that this leaves, too, get exact scores, a tile at a time, in shared memory, and the filter on them.
//
// All 8192 rows at D=4096, M=131072 take the second screen 26 TFLOP, some 0.1 s, and exact scores 8.8 TFLOP, some 0.3 s
// (estimates: half of mma's peak, of fp32's); with up to 64 rows each must read the weight once, 2 GB.

inline constexpr int kRescueThreads = 256, kRescueRows = 64, kRescueDepth = 16;
inline constexpr int kRescuePairs = kRescueDepth / 2;  // of neighbours in a row

// Rows that a screen leaves undecided, in whatever order: no row's result depends on it.
struct Undecided {
  int32_t* rows;
  int32_t* total;
  int blocks;      // of the grid that takes them on
  int most_lists;  // that there is memory for
  int groups;      // of latents

  __device__ __forceinline__ void note(int32_t row) const {
    if (threadIdx.x == 0) rows[atomicAdd(total, 1)] = row;
  }
  // How many parts the latents are cut into.
  __device__ __forceinline__ int splits() const {
    int tiles = (*total + kRescueRows - 1) / kRescueRows;
    return Most()(1, Least()(groups, Least()(blocks / tiles, most_lists / *total)));
  }
};

// What a block takes of them: rows [begin, begin + count), groups [first, last) of latents.
struct RescueShare {
  int splits, split, begin, count, first, last;

  __device__ __forceinline__ RescueShare(const Undecided& undecided) : splits(undecided.splits()) {
    int total = *undecided.total, tiles = (total + kRescueRows - 1) / kRescueRows;
    split = int(blockIdx.x) / tiles;
    begin = int(blockIdx.x) % tiles * kRescueRows;
    count = Least()(kRescueRows, total - begin);
    int part = Least()(split, splits);  // beyond the last there is nothing to do
    first = int(int64_t(undecided.groups) * part / splits);
    last = split < splits ? int(int64_t(undecided.groups) * (part + 1) / splits) : first;
  }
  __device__ __forceinline__ int64_t list(int r) const { return int64_t(begin + r) * splits + split; }
};

// Ends what the first screen has begun, a block a row; notes the rows that it leaves.
__global__ void __launch_bounds__(kSelectThreads, 4)
    topk_encode_select_screened(Lists<float> lists, int splits, Output<float> output, const uint8_t* eligible,
                                int64_t M, Undecided left) {
  Entries<float> entries{lists, int64_t(blockIdx.x) * splits, splits};
  if (entries.hopeless()) left.note(int32_t(blockIdx.x));
  else select_row(entries, output, blockIdx.x, eligible, M);
}

template <bool Keyed>
__global__ void __launch_bounds__(kRescueThreads, 2)
    topk_encode_screen_again(Lists<float> lists, Rows rows, Latents<float> latents, const Norms* tokens, float g, int M,
                             Undecided undecided) {
  constexpr int group = kGroup<float>, pad = 4, lines = kRescueThreads / kRescuePairs;
  constexpr int token_lines = kRescueRows / lines, atom_lines = group / lines;
  struct Storage {
    union {
      struct {  // high and low parts; 12 words apart, the four of eight rows lie in 32 banks
        uint32_t tokens[2][kRescueRows][kRescuePairs + pad], atoms[2][group][kRescuePairs + pad];
      } parts;
      float scores[kRescueRows][group + pad];
    };
    Packet<float> norm[group / 4], residual[group / 4], rest[group / 4];
    int32_t row[kRescueRows];
  };
  auto& shared = shared_storage<Storage>();
  if (*undecided.total == 0) return;
  RescueShare share(undecided);
  for (int r = int(threadIdx.x); r < kRescueRows; r += kRescueThreads)
    shared.row[r] = undecided.rows[share.begin + Least()(r, share.count - 1)];

  // Loads: thread t fetches two columns of rows t / 8, t / 8 + 32, ... Products: a warp takes 32 rows, 32 latents.
  const int pair = int(threadIdx.x) % kRescuePairs, line = int(threadIdx.x) / kRescuePairs;
  const int down = warp_index() / 4 * 32, across = warp_index() % 4 * 32, near = lane_index() / 4, word = lane_index() % 4;
  auto fetch = [&](float (&two)[2], const float* row, int64_t d) {
    two[0] = d < rows.D ? row[d] : 0.0f;
    two[1] = d + 1 < rows.D ? row[d + 1] : 0.0f;
  };
  const float h = float(rows.D / 32 + 16) * 0x1p-24f, lost = sqrtf(float(rows.D)) * 0x1p-116f;
  for (int each = share.first; each < share.last; ++each) {
    int m = each * group, present = Least()(group, M - m);
    float sums[2][4][4] = {}, norm[atom_lines] = {}, residual[atom_lines] = {};
    float tokens_next[token_lines][2], atoms_next[atom_lines][2];  // on their way while the last ones are multiplied
    auto fetch_all = [&](int64_t d) {
#pragma unroll
      for (int i = 0; i < token_lines; ++i)
        fetch(tokens_next[i], rows.x + shared.row[line + i * lines] * rows.x_stride, d);
#pragma unroll
      for (int i = 0; i < atom_lines; ++i)
        fetch(atoms_next[i], rows.weight + (m + Least()(line + i * lines, present - 1)) * rows.weight_stride, d);
    };
    __syncthreads();
    fetch_all(2 * pair);
    for (int64_t step = 0; step < rows.D; step += kRescueDepth) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < token_lines; ++i) {
        Parts parts(tokens_next[i]);
        shared.parts.tokens[0][line + i * lines][pair] = parts.high;
        shared.parts.tokens[1][line + i * lines][pair] = parts.low;
      }
#pragma unroll
      for (int i = 0; i < atom_lines; ++i) {
        Parts parts(atoms_next[i]);
        shared.parts.atoms[0][line + i * lines][pair] = parts.high;
        shared.parts.atoms[1][line + i * lines][pair] = parts.low;
        parts.add_squares(norm[i], residual[i]);
      }
      __syncthreads();
      fetch_all(step + kRescueDepth + 2 * pair);
      uint32_t x[2][2][4];  // of either part, rows `down` and rows `down` + 16
#pragma unroll
      for (int part = 0; part < 2; ++part)
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            x[part][i][e] = shared.parts.tokens[part][down + 16 * i + e % 2 * 8 + near][e / 2 * 4 + word];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t w[2][2];
#pragma unroll
        for (int part = 0; part < 2; ++part)
#pragma unroll
          for (int e = 0; e < 2; ++e) w[part][e] = shared.parts.atoms[part][across + 8 * j + near][e * 4 + word];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float some[4] = {};
          multiply_add(some, x[0][i], w[0]);
          multiply_add(some, x[1][i], w[0]);
          multiply_add(some, x[0][i], w[1]);
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[i][j][e] += some[e];
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          shared.scores[down + 16 * i + e / 2 * 8 + near][across + 8 * j + 2 * word + e % 2] = sums[i][j][e];
    // Squares are as good as in round_row; where they leave fp32's range, norms are too large, or infinite.
    const float safety = 1 + float(rows.D) * 0x1p-22f, least = float(rows.D) * 0x1p-148f;
#pragma unroll
    for (int i = 0; i < atom_lines; ++i) {
#pragma unroll
      for (int apart = kRescuePairs / 2; apart; apart /= 2) {
        norm[i] += __shfl_xor_sync(kAllLanes, norm[i], apart);
        residual[i] += __shfl_xor_sync(kAllLanes, residual[i], apart);
      }
      if (int r = line + i * lines; pair == 0) {
        Terms terms;
        if (r < present)
          terms = Terms({sqrtf(norm[i] + least) * safety, sqrtf(residual[i] + least) * safety}, latents, m + r, rows.D,
                        lost);
        shared.norm[r / 4].value[r % 4] = terms.norm;
        shared.residual[r / 4].value[r % 4] = terms.residual;
        shared.rest[r / 4].value[r % 4] = terms.rest;
      }
    }
    __syncthreads();
    bool open = false;
    for (int r = warp_index(); r < share.count; r += kRescueThreads / kWarp) {
      List<float> list(lists, share.list(r));
      Norms token = tokens[shared.row[r]];
      if (each > share.first) list.resume();
      else if (!token.tame()) list.count = kHopeless;
      if (list.count != kHopeless) {
        float length = token.norm + token.residual;
        float a = 1.02f * (0x1p-9f * token.residual + (g + h) * length);
        float b = 1.02f * (token.residual + 0x1p-9f * length);
        ExactRow<float, Keyed> scored(lists, {shared.scores[r], 0, m, present}, latents, 0);
        Brackets brackets{shared.norm[0].value, shared.residual[0].value, shared.rest[0].value, nullptr};
        append(ScreenedRow<Keyed>(scored, brackets, a, b), list, 0, m);
        open |= list.count != kHopeless;
      }
      list.suspend();
    }
    if (!__syncthreads_or(open)) break;
  }
}

// Ends what the second screen has begun, a block a row; notes the rows that it leaves.
__global__ void __launch_bounds__(kRefineThreads, 2)
    topk_encode_refine_again(Lists<float> lists, Rows rows, Latents<float> latents, Output<float> output, int64_t M,
                             Undecided undecided, Undecided left) {
  if (int(blockIdx.x) >= *undecided.total) return;
  int splits = undecided.splits(), row = undecided.rows[blockIdx.x];
  Entries<float> entries{lists, int64_t(blockIdx.x) * splits, splits};
  if (entries.hopeless()) return left.note(row);
  refine_row(entries, rows, row, latents);
  __syncthreads();
  select_row(entries, output, row, latents.eligible, M);
}

template <bool Keyed>
__global__ void __launch_bounds__(kRescueThreads, 2)
    topk_encode_rescue(Lists<float> lists, Rows rows, Latents<float> latents, int M, Undecided undecided) {
  constexpr int group = kGroup<float>, pad = 4;
  struct Storage {
    float tokens[kRescueDepth][kRescueRows + pad];
    float atoms[kRescueDepth][group + pad];
    float scores[kRescueRows][group + pad];
  };
  auto& shared = shared_storage<Storage>();
  if (*undecided.total == 0) return;
  RescueShare share(undecided);
  int begin = share.begin, count = share.count;

  // Loads: thread t fetches columns d + t % 16 of rows t / 16, t / 16 + 16, ... Products: 4 rows, 2 times 4 latents.
  int column = int(threadIdx.x) % kRescueDepth, line = int(threadIdx.x) / kRescueDepth;
  constexpr int lines = kRescueThreads / kRescueDepth;
  int across = int(threadIdx.x) % 16 * 4, down = int(threadIdx.x) / 16 * 4;
  for (int each = share.first; each < share.last; ++each) {
    int m = each * group, present = Least()(group, M - m);
    float sums[4][8] = {};
    for (int64_t d = 0; d < rows.D; d += kRescueDepth) {
      bool there = d + column < rows.D;
      __syncthreads();
#pragma unroll
      for (int r = line; r < kRescueRows; r += lines)
        shared.tokens[column][r] = there && r < count ? rows.x[undecided.rows[begin + r] * rows.x_stride + d + column] : 0;
#pragma unroll
      for (int r = line; r < group; r += lines)
        shared.atoms[column][r] = there && r < present ? rows.weight[(m + r) * rows.weight_stride + d + column] : 0;
      __syncthreads();
#pragma unroll 4
      for (int i = 0; i < kRescueDepth; ++i) {
        Packet<float> x = load_packet(&shared.tokens[i][down]);
        Packet<float> w[2] = {load_packet(&shared.atoms[i][across]), load_packet(&shared.atoms[i][64 + across])};
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
          for (int c = 0; c < 8; ++c) sums[r][c] += x.value[r] * w[c / 4].value[c % 4];
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_packet(&shared.scores[down + r][half * 64 + across],
                     {sums[r][4 * half], sums[r][4 * half + 1], sums[r][4 * half + 2], sums[r][4 * half + 3]});
    __syncthreads();
    for (int r = warp_index(); r < count; r += kRescueThreads / kWarp) {
      List<float> list(lists, share.list(r));
      if (each > share.first) list.resume();
      ExactRow<float, Keyed> row(lists, {shared.scores[r], 0, m, present}, latents, 0);
      append(row, list, 0, m);
      list.suspend();
    }
  }
}

__global__ void __launch_bounds__(kSelectThreads, 4)
    topk_encode_select_rescued(Lists<float> lists, Undecided undecided, Output<float> output, const uint8_t* eligible,
                               int64_t M) {
  if (int(blockIdx.x) >= *undecided.total) return;
  int splits = undecided.splits();
  Entries<float> entries{lists, int64_t(blockIdx.x) * splits, splits};
  select_row(entries, output, undecided.rows[blockIdx.x], eligible, M);
}

}  // namespace fastsparse::cuda
