#include "cpu/integers.h"

#include <algorithm>
#include <memory>

#include "cpu/simd.h"

namespace fastsparse::FASTSPARSE_ISA {

namespace {

// ---- what Strassen's products are of ----

typedef int16_t Shorts __attribute__((vector_size(kVectorBytes)));
constexpr int kShorts = kVectorBytes / sizeof(int16_t);

template <typename V> inline V combined(const strassen::Combination& of, const V* quarters) {
  V first = quarters[of.part[0]], second = quarters[of.part[1]];
  return V(of.count == 1 ? first : of.minus ? first - second : first + second);
}

// Of what a group has at one place of each part, at(row, column), what each product's side has there, one after another.
template <auto Side, typename At, typename Put> inline void combine(const At& at, const Put& put) {
  using V = decltype(at(0, 0));
#pragma GCC unroll 7
  for (int i = 0; i < 7; ++i) {
    V outer[4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      V quarters[4];
#pragma GCC unroll 4
      for (int o = 0; o < 4; ++o) quarters[o] = at(o / 2 * 2 + q / 2, o % 2 * 2 + q % 2);
      outer[q] = combined<V>(strassen::kStep[i].*Side, quarters);
    }
#pragma GCC unroll 7
    for (int j = 0; j < 7; ++j) put(combined<V>(strassen::kStep[j].*Side, outer));
  }
}

template <typename V> inline V load_integers(const int16_t* from) {
  V result;
  std::memcpy(&result, from, sizeof result);
  return result;
}
template <typename V> inline void store_integers(V value, int16_t* to) { std::memcpy(to, &value, sizeof value); }

// ---- their product ----

typedef uint32_t Integers __attribute__((vector_size(kVectorBytes)));  // which wrap around
constexpr int kVectors = 2, kWidth = kVectors * kLanes<float>;         // latents of a tile
static_assert(kLatentPanel % kWidth == 0);

inline Integers broadcast_pair(const int16_t* from) {
  uint32_t pair;
  std::memcpy(&pair, from, sizeof pair);
  return pair + Integers{};
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
  typedef int32_t Signed __attribute__((vector_size(kVectorBytes)));
  auto low = [](Integers pair) { return (Integers)((Signed)(pair << 16) >> 16); };
  auto high = [](Integers pair) { return (Integers)((Signed)pair >> 16); };
  return low(a) * low(b) + high(a) * high(b);
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

typedef Integers Tile[kTokenPanel][kVectors];

// What a panel of tokens and kWidth latents, of rows of `Width`, give in `pairs` pairs of columns.
template <bool Fused, int64_t Width>
inline void multiply(const int16_t* tokens, const int16_t* latents, int64_t pairs, Tile& result) {
  Part part[kTokenPanel][kVectors] = {};
  auto add_pair = [&](int64_t p) __attribute__((always_inline)) {
    Integers latent[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) latent[j] = load_integers<Integers>(latents + 2 * (p * Width + kLanes<float> * j));
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
    for (int j = 0; j < kVectors; ++j) result[i][j] = whole(part[i][j]);
}

template <bool Minus> inline void add(const Tile& term, Tile& to) {
#pragma GCC unroll 6
  for (int i = 0; i < kTokenPanel; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) to[i][j] = Minus ? to[i][j] - term[i][j] : to[i][j] + term[i][j];
}

// The scores of tokens from `n` on and latents from `m` on.
void put(const IntegerProduct& args, int64_t n, int64_t m, const Tile& sums) {
  constexpr int lanes = kLanes<float>;
  for (int64_t i = 0; i < std::min(kTokenPanel, args.N - n); ++i)
    for (int j = 0; j < kVectors; ++j) {
      int64_t at = m + j * lanes, left = args.count - at;
      if (left <= 0) break;
      Vector<float> sum = __builtin_convertvector((VectorOf<float>::bits)sums[i][j], Vector<float>);
      Vector<float> score = sum * (broadcast(args.token_scale[n + i]) * load(args.latent_scale + at));
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

constexpr int64_t kLine = 32;  // integers of a line of the cache
struct alignas(2 * kLine) Line { int16_t integers[kLine]; };

// Memory that a thread keeps from call to call: fresh memory would cost the system's clearing of it.
int16_t* own_integers(int64_t count) {
  static thread_local std::unique_ptr<Line[]> lines;
  static thread_local int64_t there = 0;
  if (int64_t needed = panels(count, kLine); needed > there) {
    there = 0;
    lines.reset(new Line[needed]);
    there = needed;
  }
  return lines[0].integers;
}

// The right sides of all products with kWidth latents of a group, from `column` of their panels on, `apart` from one
// another.
void combine_latents(const int16_t* group, int64_t column, int64_t D, int16_t* right, int64_t apart) {
  const int64_t part = part_integers(D, kLatentPanel);
  for (int64_t p = 0; p < pairs_of_part(D); ++p)
    for (int64_t w = 0; w < 2 * kWidth; w += kShorts) {
      const int16_t* from = group + 2 * (p * kLatentPanel + column) + w;
      int16_t* to = right + p * 2 * kWidth + w;
      combine<&strassen::Product::right>(  // whose rows are columns of the latents
          [&](int row, int panel) { return load_integers<Shorts>(from + (panel * strassen::kSide + row) * part); },
          [&](Shorts side) {
            store_integers(side, to);
            to += apart;
            asm("" : "+r"(to));  // else the compiler keeps 49 addresses, in memory
          });
    }
}

// Groups of tokens whose sums stay in the first cache while products are added to them.
constexpr int kTogether = 128 / kVectorBytes;

template <bool Fused> void by_strassen(const IntegerProduct& args, int64_t group_begin, int64_t group_end) {
  using strassen::kSide, strassen::kParts, strassen::kProducts;
  const int64_t pairs = pairs_of_part(args.D), left_side = part_integers(args.D, kTokenPanel),
                token_groups = groups(args.N, kTokenPanel);
  // An odd number of cache lines apart, or the sides would all go to the same few sets of the cache.
  const int64_t right_side = (panels(part_integers(args.D, kWidth), kLine) | 1) * kLine;
  int16_t* right = own_integers(kProducts * right_side);
  Tile sums[kTogether][kParts];
  for (int64_t g = group_begin; g < group_end; ++g)
    for (int64_t column = 0; column < kLatentPanel; column += kWidth) {
      combine_latents(args.latents + g * kSide * panel_integers(args.D, kLatentPanel), column, args.D, right, right_side);
      for (int64_t first = 0; first < token_groups; first += kTogether) {
        int64_t together = std::min<int64_t>(kTogether, token_groups - first);
        std::memset(sums, 0, together * sizeof *sums);
        for (int i = 0; i < kProducts; ++i) {
          const strassen::Combination& result = strassen::kResults.of[i];
          for (int64_t t = 0; t < together; ++t) {
            const int16_t* left = args.tokens + ((first + t) * kProducts + i) * left_side;
            Tile term;
            multiply<Fused, kWidth>(left, right + i * right_side, pairs, term);
            for (int r = 0; r < result.count; ++r) {
              Tile& to = sums[t][result.part[r]];
              if (result.minus && r >= result.count / 2) add<true>(term, to);
              else add<false>(term, to);
            }
          }
        }
        for (int64_t t = 0; t < together; ++t)
          for (int p = 0; p < kParts; ++p)
            put(args, ((first + t) * kSide + p / kSide) * kTokenPanel, (g * kSide + p % kSide) * kLatentPanel + column,
                sums[t][p]);
      }
    }
}

template <bool Fused> void by_definition(const IntegerProduct& args, int64_t group_begin, int64_t group_end) {
  const int64_t tokens = panel_integers(args.D, kTokenPanel), latents = panel_integers(args.D, kLatentPanel);
  for (int64_t p = group_begin * strassen::kSide; p < group_end * strassen::kSide; ++p)
    for (int64_t column = 0; column < kLatentPanel; column += kWidth)  // which stays in the first cache
      for (int64_t t = 0; t < panels(args.N, kTokenPanel); ++t) {
        Tile sums;
        multiply<Fused, kLatentPanel>(args.tokens + t * tokens, args.latents + p * latents + 2 * column,
                                      strassen::kSide * pairs_of_part(args.D), sums);
        put(args, t * kTokenPanel, p * kLatentPanel + column, sums);
      }
}

template <bool Fused> void multiply_all(const IntegerProduct& args, int64_t group_begin, int64_t group_end) {
  if (args.combined) by_strassen<Fused>(args, group_begin, group_end);
  else by_definition<Fused>(args, group_begin, group_end);
}

}  // namespace

void integers_combine(const int16_t* tokens, int64_t D, int16_t* combined, int64_t group_begin, int64_t group_end) {
  const int64_t part = part_integers(D, kTokenPanel);
  for (int64_t g = group_begin; g < group_end; ++g) {
    const int16_t* group = tokens + g * strassen::kParts * part;
    int16_t* left = combined + g * combined_integers(D);
    auto combine_at = [&]<typename V>(int64_t w, V) {
      int16_t* to = left + w;
      combine<&strassen::Product::left>(
          [&](int panel, int column) { return load_integers<V>(group + (panel * strassen::kSide + column) * part + w); },
          [&](V side) {
            store_integers(side, to);
            to += part;
          });
    };
    int64_t w = 0;
    for (; w + kShorts <= part; w += kShorts) combine_at(w, Shorts{});
    for (; w < part; ++w) combine_at(w, int16_t{});
  }
}

void integers_product(const IntegerProduct& args, int64_t group_begin, int64_t group_end) {
#if defined(__AVX2__)
  if (args.fused) return multiply_all<true>(args, group_begin, group_end);
#endif
  multiply_all<false>(args, group_begin, group_end);
}

}  // namespace fastsparse::FASTSPARSE_ISA
