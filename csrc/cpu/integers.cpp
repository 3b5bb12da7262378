#include "cpu/integers.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/simd.h"

namespace fastsparse::FASTSPARSE_ISA {

namespace {

// ---- rows to integers ----

constexpr int64_t kChunk = 64;           // columns at a time: what a panel has of them stays in the first cache
constexpr float kToInteger = 0x1.8p23f;  // a number's nearest integer is in the last bits of their sum
constexpr float kLeast = 0x1p-100f;      // rows of none but smaller numbers are taken for zeros

// The largest magnitude; NaN where a number isn't finite.
template <typename T> float most_of(const T* row, int64_t D) {
  constexpr int lanes = kLanes<float>;
  Vector<float> most = {}, zeros = {};
  for (int64_t d = 0; d < D; d += lanes) {
    Vector<float> numbers = load_up_to(row + d, D - d);
    most = at_least(absolute(numbers), most);
    zeros += numbers * 0.0f;
  }
  float result = sum<float>(zeros);
  for (int i = 0; i < lanes; ++i) result = std::max(result, most[i]);  // which keeps a NaN that comes first
  return result;
}

struct Scale {
  float up, down;  // to integers and back; both 0 for rows that are zeros, or not finite
};

Scale scale_of(float most) {
  if (!(most >= kLeast)) return {0, 0};
  return {float(kLargestInteger) / most, most / float(kLargestInteger)};
}

typedef uint64_t Pairs __attribute__((vector_size(kVectorBytes)));  // of columns

// Columns [begin, end) of a row into its place in a panel; adds up squares of what they have become and of what is lost.
template <typename T>
void round_part(const T* row, int64_t begin, int64_t end, Scale scale, int64_t height, int16_t* to,
                Vector<float>& norm_squared, Vector<float>& residual_squared) {
  constexpr int lanes = kLanes<float>;
  Vector<float> norms = norm_squared, residuals = residual_squared;
  for (int64_t d = begin; d < end; d += lanes) {
    Vector<float> exact = load_up_to(row + d, end - d), sums = exact * scale.up + kToInteger;
    Pairs pairs = (Pairs)((Words)sums - (Words)broadcast(kToInteger));
    pairs = (pairs & 0xffff) | (pairs >> 16 & 0xffff0000);
    Vector<float> near = (sums - kToInteger) * scale.down, gap = exact - near;
    norms += near * near;
    residuals += gap * gap;
    uint64_t of_two[lanes / 2];
    std::memcpy(of_two, &pairs, sizeof of_two);
    for (int64_t i = 0; i < lanes / 2 && d + 2 * i < end; ++i) {
      auto pair = uint32_t(of_two[i]);
      std::memcpy(to + (d + 2 * i) * height, &pair, sizeof pair);
    }
  }
  norm_squared = norms;
  residual_squared = residuals;
}

// The norms of a row, of its integers from `to` on; never less than they are (see rows.cpp), and infinite where `most`,
// the row's largest magnitude, is NaN.
template <typename T>
void set_norms(const T* row, int64_t D, float most, Scale scale, int64_t height, const int16_t* to, double norm_squared,
               double residual_squared, float& norm, float& residual) {
  if (most != most) {
    norm = residual = std::numeric_limits<float>::infinity();
    return;
  }
  if (!(norm_squared > 1e-25 && norm_squared < 1e30 && residual_squared < 1e30)) {  // squares may have left fp32's range
    norm_squared = residual_squared = 0;
    for (int64_t d = 0; d < D; ++d) {
      double near = double(to[d / 2 * 2 * height + d % 2]) * scale.down, gap = double(to_float(row[d])) - near;
      norm_squared += near * near;
      residual_squared += gap * gap;
    }
  }
  double safety = 1 + double(D) * 0x1p-23, length = std::sqrt(norm_squared + double(D) * 0x1p-149) * safety;
  norm = float(length);
  residual = float(std::sqrt(residual_squared + double(D) * 0x1p-149) * safety + length * 0x1p-23);
}

template <typename T>
void round_panel(const Rows& rows, int64_t first, int64_t there, int64_t height, const Rounded& to, int16_t* panel) {
  float most[kLatentPanel];
  Scale scales[kLatentPanel];
  Vector<float> norms[kLatentPanel] = {}, residuals[kLatentPanel] = {};
  for (int64_t i = 0; i < there; ++i) {
    most[i] = most_of(row_of<T>(rows, first + i), rows.D);
    scales[i] = scale_of(most[i]);
    to.scale[first + i] = scales[i].down;
  }
  for (int64_t d = 0; d < rows.D; d += kChunk) {
    int64_t end = std::min(d + kChunk, rows.D);
    for (int64_t i = 0; i < height; ++i) {
      if (i < there && most[i] == most[i]) {
        round_part(row_of<T>(rows, first + i), d, end, scales[i], height, panel + 2 * i, norms[i], residuals[i]);
        continue;
      }
      for (int64_t c = d; c < end; c += 2) std::memset(panel + c * height + 2 * i, 0, 2 * sizeof *panel);
    }
  }
  for (int64_t i = 0; i < there; ++i)
    set_norms(row_of<T>(rows, first + i), rows.D, most[i], scales[i], height, panel + 2 * i, sum<float>(norms[i]),
              sum<float>(residuals[i]), to.norm[first + i], to.residual[first + i]);
}

// ---- their product ----

typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
constexpr int kVectors = 2, kWidth = kVectors * kLanes<float>;  // latents of a tile
static_assert(kLatentPanel % kWidth == 0);

inline Integers load_integers(const int16_t* from) {
  Integers result;
  std::memcpy(&result, from, sizeof result);
  return result;
}

inline Integers broadcast_pair(const int16_t* from) {
  int32_t pair;
  std::memcpy(&pair, from, sizeof pair);
  return pair - Integers{};
}

#if defined(__aarch64__)
// SMLAL multiplies single integers: the two columns of pairs are added up apart, and to one another in the end.
struct Part { int32x4_t low, high; };
template <bool> inline Part with_products(Part sum, Integers a, Integers b) {
  return {vmlal_s16(sum.low, vget_low_s16((int16x8_t)a), vget_low_s16((int16x8_t)b)),
          vmlal_high_s16(sum.high, (int16x8_t)a, (int16x8_t)b)};
}
inline Integers whole(Part sum) { return (Integers)vpaddq_s32(sum.low, sum.high); }
#else
typedef Integers Part;
inline Integers whole(Part sum) { return sum; }

// Of the two integers in each lane: the sum of their products with the other's.
inline Integers products(Integers a, Integers b) {
#if defined(__AVX512BW__)
  return (Integers)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Integers)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Integers)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

// sum + products(a, b). By the assembler: a level's compiler knows nothing of what only some of its processors have.
template <bool Fused> inline Part with_products(Part sum, Integers a, Integers b) {
  if constexpr (!Fused) return sum + products(a, b);
#if defined(__AVX512BW__)
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#elif defined(__AVX2__)
  asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#endif
  return sum;
}
#endif

typedef Vector<float> Tile[kTokenPanel][kVectors];

// sums += what a panel of tokens and kWidth latents of a panel give in `pairs` pairs of columns.
template <bool Fused> inline void add_products(const int16_t* tokens, const int16_t* latents, int64_t pairs, Tile& sums) {
  Part part[kTokenPanel][kVectors] = {};
  auto add_pair = [&](int64_t p) __attribute__((always_inline)) {
    Integers latent[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) latent[j] = load_integers(latents + 2 * (p * kLatentPanel + kLanes<float> * j));
#pragma GCC unroll 6
    for (int i = 0; i < kTokenPanel; ++i) {
      Integers token = broadcast_pair(tokens + 2 * (p * kTokenPanel + i));
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) part[i][j] = with_products<Fused>(part[i][j], token, latent[j]);
    }
  };
  // Several pairs at once would cost copies of registers: GCC can't see into the assembler, and NEON's are all in use.
  if constexpr (Fused || sizeof(Part) > sizeof(Integers)) {
#pragma GCC unroll 1
    for (int64_t p = 0; p < pairs; ++p) add_pair(p);
  } else {
#pragma GCC unroll 4
    for (int64_t p = 0; p < pairs; ++p) add_pair(p);
  }
#pragma GCC unroll 6
  for (int i = 0; i < kTokenPanel; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sums[i][j] += __builtin_convertvector(whole(part[i][j]), Vector<float>);
}

// The scores of tokens from `n` on and latents from `m` on.
void put(const IntegerProduct& args, int64_t n, int64_t m, const Tile& sums) {
  constexpr int lanes = kLanes<float>;
  for (int64_t i = 0; i < std::min(kTokenPanel, args.N - n); ++i)
    for (int j = 0; j < kVectors; ++j) {
      int64_t at = m + j * lanes, left = args.count - at;
      if (left <= 0) break;
      Vector<float> score = sums[i][j] * (broadcast(args.tokens.scale[n + i]) * load(args.latents.scale + at));
      bf16* to = args.scores + (n + i) * args.count + at;
      if (left >= lanes) {
        store(score, to);
        continue;
      }
      bf16 last[lanes];
      store(score, last);
      std::copy_n(last, left, to);
    }
}

template <bool Fused> void multiply(const IntegerProduct& args, int64_t panel_begin, int64_t panel_end) {
  const int64_t pairs = (args.D + 1) / 2, token_integers = panel_integers(args.D, kTokenPanel),
                latent_integers = panel_integers(args.D, kLatentPanel), token_panels = panels(args.N, kTokenPanel);
  for (int64_t p = panel_begin; p < panel_end; ++p)
    for (int64_t column = 0; column < kLatentPanel; column += kWidth) {  // which stays in the first cache
      auto* latents = static_cast<const int16_t*>(args.latents.rows) + p * latent_integers + 2 * column;
      for (int64_t t = 0; t < token_panels; ++t) {
        auto* tokens = static_cast<const int16_t*>(args.tokens.rows) + t * token_integers;
        Tile sums = {};
        for (int64_t done = 0; done < pairs; done += kPart / 2)
          add_products<Fused>(tokens + done * 2 * kTokenPanel, latents + done * 2 * kLatentPanel,
                              std::min(kPart / 2, pairs - done), sums);
        put(args, t * kTokenPanel, p * kLatentPanel + column, sums);
      }
    }
}

}  // namespace

void integers_round(const Rows& rows, int64_t count, int64_t height, const Rounded& to, int64_t panel_begin,
                    int64_t panel_end) {
  with_type(rows.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(T) < 8)  // fp64 is never screened
      for (int64_t p = panel_begin; p < panel_end; ++p)
        round_panel<T>(rows, p * height, std::min(height, count - p * height), height, to,
                       static_cast<int16_t*>(to.rows) + p * panel_integers(rows.D, height));
  });
}

void integers_product(const IntegerProduct& args, int64_t panel_begin, int64_t panel_end) {
#if defined(__AVX2__)
  if (args.fused) return multiply<true>(args, panel_begin, panel_end);
#endif
  multiply<false>(args, panel_begin, panel_end);
}

}  // namespace fastsparse::FASTSPARSE_ISA
