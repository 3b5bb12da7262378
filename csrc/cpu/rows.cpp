#include "cpu/rows.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/bf16_panels.h"
#include "cpu/dot.h"

namespace fastsparse::FASTSPARSE_ISA {

namespace {

// Of sums of D squares in fp32, which are good to D 2^-24 relatively, and each square to 2^-149 absolutely.
float norm_of(double squared, int64_t D) {
  return float(std::sqrt(squared + double(D) * 0x1p-149) * (1 + double(D) * 0x1p-23));
}

bool in_range(float squared) { return squared > 1e-25f && squared < 1e30f; }  // of fp32's, and so were all squares

// Into a panel, a quad lies `height` quads behind the one before, and a vector is a quad; else `height` is 1.
template <typename T>
void round_row(const T* row, int64_t D, int64_t height, bf16* rounded, float& norm, float& residual) {
  constexpr int lanes = kLanes<float>;
  static_assert(!kBf16Panels || lanes == kQuad);
  auto at = [&](int64_t d) { return rounded + d / kQuad * kQuad * height + d % kQuad; };
  Vector<float> norm_lanes = {}, residual_lanes = {};
  int64_t d = 0;
  for (; d + lanes <= D; d += lanes) {
    Vector<float> exact = load(row + d);
    store(exact, rounded + d * height);
    Vector<float> near = load(rounded + d * height), gap = exact - near;
    norm_lanes += near * near;
    residual_lanes += gap * gap;
  }
  float norm_squared = sum<float>(norm_lanes), residual_squared = sum<float>(residual_lanes);
  for (; d < D; ++d) {
    float exact = to_float(row[d]);
    from_float(exact, *at(d));
    float near = to_float(*at(d)), gap = exact - near;
    norm_squared += near * near;
    residual_squared += gap * gap;
  }
  if (height > 1)
    for (; d % kQuad; ++d) *at(d) = bf16{};
  double wide_norm = norm_squared, wide_residual = residual_squared;
  if (!in_range(norm_squared)) {
    wide_norm = wide_residual = 0;
    for (d = 0; d < D; ++d) {
      double near = to_float(*at(d)), gap = double(to_float(row[d])) - near;
      wide_norm += near * near;
      wide_residual += gap * gap;
    }
  }
  norm = norm_of(wide_norm, D);
  residual = norm_of(wide_residual, D);
}

// The same of a row that there is nothing to round of, and the sum of whose squares in fp32 is known.
void set_norms(const bf16* row, int64_t D, float in_fp32, float& norm, float& residual) {
  double squared = in_range(in_fp32) ? in_fp32 : squared_norm(row, D);
  norm = norm_of(squared, D);
  residual = norm_of(squared - squared, D);  // NaN of what isn't finite
}

void measure_row(const bf16* row, int64_t D, float& norm, float& residual) {
  constexpr int lanes = kLanes<float>, chains = 4;  // of sums, lest each waits for the last
  Vector<float> lanes_of[chains] = {};
  int64_t d = 0;
  for (; d + chains * lanes <= D; d += chains * lanes)
#pragma GCC unroll 4
    for (int i = 0; i < chains; ++i) {
      Vector<float> part = load(row + d + i * lanes);
      lanes_of[i] += part * part;
    }
  for (; d < D; d += lanes) {
    Vector<float> part = load_up_to(row + d, D - d);
    lanes_of[0] += part * part;
  }
  set_norms(row, D, sum<float>((lanes_of[0] + lanes_of[1]) + (lanes_of[2] + lanes_of[3])), norm, residual);
}

}  // namespace

void rows_round(const Rows& rows, int64_t height, const Rounded& to, int64_t begin, int64_t end) {
  const int64_t panel = height > 1 ? panel_bf16s(rows.D, height) : rows.D;
  with_type(rows.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(T) < 8)  // fp64 is never screened
      for (int64_t i = begin; i < end; ++i) {
        const T* row = row_of<T>(rows, i);
        if constexpr (std::is_same_v<T, bf16>)
          if (to.rows == rows.data) {
            measure_row(row, rows.D, to.norm[i], to.residual[i]);
            continue;
          }
        round_row(row, rows.D, height, static_cast<bf16*>(to.rows) + i / height * panel + i % height * kQuad, to.norm[i],
                  to.residual[i]);
      }
  });
}

void rows_widen(const Rows& rows, void* widened, int64_t begin, int64_t end) {
  with_type(rows.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = Accumulator<T>;
    for (int64_t i = begin; i < end; ++i) {
      const T* row = row_of<T>(rows, i);
      C* wide = static_cast<C*>(widened) + i * rows.D;
      int64_t d = 0;
      for (; d + kLanes<C> <= rows.D; d += kLanes<C>) store(load(row + d), wide + d);
      for (; d < rows.D; ++d) wide[d] = to_float(row[d]);
    }
  });
}

namespace {

// A tile of scores stays in registers: what is read of either side serves the whole of the other. (Sixteen registers hold
// 4 x 3 sums and what goes into them, thirty-two 4 x 6.)
constexpr int kTileTokens = 4, kTileLatents = kVectorBytes == 64 ? 6 : 3;
static_assert(kScoredTogether % kTileLatents == 0);

// scores[i * apart + j] = <x + i * x_stride, atoms[j]>, each summed in one order, whatever its company. Rows are short for
// a processor that fetches ahead by itself: it is told of those that come `next`.
template <int Tokens, int Latents, typename T>
inline void score_tile(const Accumulator<T>* x, int64_t x_stride, const T* const (&atoms)[Latents],
                       const T* const (&next)[Latents], int64_t D, Accumulator<T>* scores, int64_t apart) {
  using C = Accumulator<T>;
  constexpr int lanes = kLanes<C>, line = std::max<int>(lanes, 64 / sizeof(T));
  Vector<C> sums[Tokens][Latents] = {};
  auto add = [&](const auto& read, int64_t d) __attribute__((always_inline)) {
    Vector<C> atom[Latents];
#pragma GCC unroll 8
    for (int j = 0; j < Latents; ++j) atom[j] = read(atoms[j] + d);
#pragma GCC unroll 8
    for (int i = 0; i < Tokens; ++i) {
      Vector<C> token = read(x + i * x_stride + d);
#pragma GCC unroll 8
      for (int j = 0; j < Latents; ++j) sums[i][j] += token * atom[j];
    }
  };
  int64_t whole = D / line * line;  // what is left comes first, see dots
  for (int64_t d = whole; d < D; d += lanes) add([&](const auto* from) { return load_up_to(from, D - d); }, d);
  for (int64_t d = 0; d < whole; d += line) {
#pragma GCC unroll 8
    for (int j = 0; j < Latents; ++j) prefetch(next[j] + d);
#pragma GCC unroll 8
    for (int step = 0; step < line; step += lanes) add([](const auto* from) { return load(from); }, d + step);
  }
#pragma GCC unroll 8
  for (int i = 0; i < Tokens; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Latents; ++j) scores[i * apart + j] = sum<C>(sums[i][j]);
}

// All tokens with latents from `m` on, of `count`.
template <int Latents, typename T>
void score(const Rows& x, int64_t N, const Rows& weight, int64_t m, Accumulator<T>* scores, int64_t count) {
  using C = Accumulator<T>;
  const T *atoms[Latents], *next[Latents];
  for (int j = 0; j < Latents; ++j) {
    atoms[j] = row_of<T>(weight, m + j);
    next[j] = row_of<T>(weight, std::min(m + j + Latents, count - 1));
  }
  int64_t tiles = (N + kTileTokens - 1) / kTileTokens;  // of even size: 3 and 2 tokens take less than 4 and 1
  for (int64_t t = 0; t < tiles; ++t) {
    int64_t n = N * t / tiles, tokens = N * (t + 1) / tiles - n;
    const C* first = row_of<C>(x, n);
    C* to = scores + n * count + m;
    switch (tokens) {
      case 1: score_tile<1>(first, x.stride, atoms, next, x.D, to, count); break;
      case 2: score_tile<2>(first, x.stride, atoms, next, x.D, to, count); break;
      case 3: score_tile<3>(first, x.stride, atoms, next, x.D, to, count); break;
      default: score_tile<kTileTokens>(first, x.stride, atoms, next, x.D, to, count);
    }
  }
}

}  // namespace

// ---- bf16 scores of bf16 rows ----

namespace {

// By fp32 sums, of what fits no vector and where processors have nothing better.
void score_bf16(const Rows& x, int64_t n, const bf16* atom, bf16& score) {
  const bf16* const rows[1] = {row_of<bf16>(x, n)};
  float product[1];
  dots<1>(atom, rows, x.D, product);
  from_float(product[0], score);
}

#if defined(__AVX512F__)
#define FASTSPARSE_BF16_DOTS __attribute__((target("avx512bf16")))

// The sums of each one's lanes.
inline __m128 sums_of(__m512 a, __m512 b, __m512 c, __m512 d) {
  __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
  __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Some columns of some latents with as many of tokens and, for norms, with their own: an instruction adds the products of
// a pair of columns to each lane.
template <int Tokens, bool Norms>
FASTSPARSE_BF16_DOTS inline __attribute__((always_inline)) void add_dots(
    const bf16* x, int64_t x_stride, const bf16* const (&atoms)[kNarrowTogether], int64_t d, __mmask32 columns,
    __m512 (&sums)[Tokens + Norms][kNarrowTogether]) {
  __m512bh atom[kNarrowTogether];
#pragma GCC unroll 8
  for (int j = 0; j < kNarrowTogether; ++j) atom[j] = (__m512bh)_mm512_maskz_loadu_epi16(columns, atoms[j] + d);
#pragma GCC unroll 8
  for (int i = 0; i < Tokens + Norms; ++i) {
    __m512bh token{};
    if (i < Tokens) token = (__m512bh)_mm512_maskz_loadu_epi16(columns, x + i * x_stride + d);
#pragma GCC unroll 8
    for (int j = 0; j < kNarrowTogether; ++j)
      sums[i][j] = _mm512_dpbf16_ps(sums[i][j], i < Tokens ? token : atom[j], atom[j]);
  }
}

// Tokens from `x` on with some latents, `left` of which are there, and the squared norms of these.
struct NarrowTile {
  const bf16* x;
  int64_t x_stride, D;
  const bf16 *atoms[kNarrowTogether], *next[kNarrowTogether];
  int64_t told, tell;  // which of the next latents the processor is to fetch meanwhile
  bf16* scores;        // `apart` from those of the next token
  int64_t apart, left;
  float squared[kNarrowTogether];
};

template <int Tokens, bool Norms> FASTSPARSE_BF16_DOTS void score_bf16_tile(NarrowTile& tile) {
  constexpr int lanes = 32;
  __m512 sums[Tokens + Norms][kNarrowTogether];
#pragma GCC unroll 8
  for (int i = 0; i < Tokens + Norms; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kNarrowTogether; ++j) sums[i][j] = _mm512_setzero_ps();
  int64_t d = 0;
  for (; d + lanes <= tile.D; d += lanes) {
    for (int64_t j = tile.told; j < tile.tell; ++j) prefetch(tile.next[j] + d);
    add_dots<Tokens, Norms>(tile.x, tile.x_stride, tile.atoms, d, ~__mmask32{0}, sums);
  }
  if (d < tile.D) add_dots<Tokens, Norms>(tile.x, tile.x_stride, tile.atoms, d, (__mmask32{1} << (tile.D - d)) - 1, sums);
#pragma GCC unroll 8
  for (int i = 0; i < Tokens + Norms; ++i) {
    float of[kNarrowTogether];
    _mm_storeu_ps(i < Tokens ? of : tile.squared, sums_of(sums[i][0], sums[i][1], sums[i][2], sums[i][3]));
    for (int64_t j = 0; j < tile.left && i < Tokens; ++j) from_float(of[j], tile.scores[i * tile.apart + j]);
  }
}

// So many tokens or, with norms, which are as much work as a token, one less.
template <bool Norms> void score_bf16_tile_of(int64_t tokens, NarrowTile& tile) {
  switch (tokens) {
    case 1: return score_bf16_tile<1 - Norms, Norms>(tile);
    case 2: return score_bf16_tile<2 - Norms, Norms>(tile);
    case 3: return score_bf16_tile<3 - Norms, Norms>(tile);
    case 4: return score_bf16_tile<4 - Norms, Norms>(tile);
    case 5: return score_bf16_tile<5 - Norms, Norms>(tile);
    default: return score_bf16_tile<6 - Norms, Norms>(tile);
  }
}

// All tokens with latents from `m` on.
void score_bf16_by_dots(const Rows& x, int64_t N, const Rows& weight, const Rounded& norms, int64_t count, bf16* scores,
                        int64_t m, int64_t end) {
  NarrowTile tile{.x = nullptr, .x_stride = x.stride, .D = x.D, .atoms = {}, .next = {}, .told = 0, .tell = 0, .scores = nullptr,
                  .apart = count, .left = std::min(kNarrowTogether, end - m), .squared = {}};
  for (int64_t j = 0; j < kNarrowTogether; ++j) {
    tile.atoms[j] = row_of<bf16>(weight, std::min(m + j, end - 1));
    tile.next[j] = row_of<bf16>(weight, std::min(m + j + kNarrowTogether, count - 1));
  }
  int64_t tiles = (N + 1 + 5) / 6;
  for (int64_t t = 0, n = 0; t < tiles; ++t) {
    int64_t rows = (N + 1) * (t + 1) / tiles - (N + 1) * t / tiles;
    tile.x = row_of<bf16>(x, n);
    tile.scores = scores + n * count + m;
    tile.told = tile.tell;
    tile.tell = kNarrowTogether * (t + 1) / tiles;
    if (t == 0) score_bf16_tile_of<true>(rows, tile);
    else score_bf16_tile_of<false>(rows, tile);
    n += rows - (t == 0);
  }
  for (int64_t j = 0; j < tile.left; ++j)
    set_norms(tile.atoms[j], x.D, tile.squared[j], norms.norm[m + j], norms.residual[m + j]);
}
#endif

}  // namespace

void rows_score_bf16(const Rows& x, int64_t N, const Rows& weight, const Rounded& norms, int64_t count, bf16* scores,
                     int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; m += kNarrowTogether) {
#if defined(__AVX512F__)
    if (cpu_features().bf16_dots) {
      score_bf16_by_dots(x, N, weight, norms, count, scores, m, end);
      continue;
    }
#endif
    for (int64_t i = m; i < std::min(m + kNarrowTogether, end); ++i) {
      const bf16* atom = row_of<bf16>(weight, i);
      measure_row(atom, x.D, norms.norm[i], norms.residual[i]);
      for (int64_t n = 0; n < N; ++n) score_bf16(x, n, atom, scores[n * count + i]);
    }
  }
}

void rows_score(const Rows& x, int64_t N, const Rows& weight, int64_t count, void* scores, int64_t begin, int64_t end) {
  with_type(weight.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto* to = static_cast<Accumulator<T>*>(scores);
    int64_t m = begin;
    for (; m + kTileLatents <= end; m += kTileLatents) score<kTileLatents, T>(x, N, weight, m, to, count);
    for (; m < end; ++m) score<1, T>(x, N, weight, m, to, count);
  });
}

}  // namespace fastsparse::FASTSPARSE_ISA
