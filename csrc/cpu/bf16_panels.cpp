#include "cpu/bf16_panels.h"

#include <algorithm>

#include "cpu/simd.h"

#if defined(__aarch64__)

namespace fastsparse::FASTSPARSE_ISA {

namespace {

// Of functions that only processors with cpu_features().fast_bf16 may call.
#define FASTSPARSE_BFMMLA __attribute__((target("arch=armv8.2-a+bf16")))

constexpr int kRows = 2;  // of a vector, and so of either side of a product
constexpr int kTokens = int(kTokenPanel) / kRows, kLatents = 8;  // vectors; with the tile's, 24, most of 32 registers
constexpr int64_t kWidth = kRows * kLatents;                     // latents of a tile
static_assert(kTokenPanel % kRows == 0 && kLatentPanel % kWidth == 0);

typedef float32x4_t Tile[kTokens][kLatents];  // each [2][2]: a token's scores of two latents, then the next token's

FASTSPARSE_BFMMLA inline bfloat16x8_t load_quads(const bf16* from) {
  bfloat16x8_t result;
  std::memcpy(&result, from, sizeof result);
  return result;
}

// What a panel of tokens and kWidth latents of a panel give.
FASTSPARSE_BFMMLA inline void multiply(const bf16* tokens, const bf16* latents, int64_t quads, Tile& sums) {
  float32x4_t tile[kTokens][kLatents] = {};
  for (int64_t q = 0; q < quads; ++q, tokens += kQuad * kTokenPanel, latents += kQuad * kLatentPanel) {
    bfloat16x8_t token[kTokens];
#pragma GCC unroll 3
    for (int i = 0; i < kTokens; ++i) token[i] = load_quads(tokens + kRows * kQuad * i);
#pragma GCC unroll 8
    for (int j = 0; j < kLatents; ++j) {
      // Else the compiler loads all eight first, and runs out of registers: two wait for those before to be used.
      if (j > 0 && j % 2 == 0)
        asm("" : "+r"(latents) : "w"(tile[0][j - 1]), "w"(tile[1][j - 1]), "w"(tile[2][j - 1]));
      bfloat16x8_t latent = load_quads(latents + kRows * kQuad * j);
#pragma GCC unroll 3
      for (int i = 0; i < kTokens; ++i) tile[i][j] = vbfmmlaq_f32(tile[i][j], token[i], latent);
    }
  }
#pragma GCC unroll 3
  for (int i = 0; i < kTokens; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kLatents; ++j) sums[i][j] = tile[i][j];
}

// Of four scores those that are there.
void put_up_to(float32x4_t scores, int64_t left, bf16* to) {
  if (left >= kQuad) return store((Vector<float>)scores, to);
  bf16 last[kQuad];
  store((Vector<float>)scores, last);
  std::copy_n(last, std::max<int64_t>(left, 0), to);
}

// The scores of tokens from `n` on and latents from `m` on.
void put(const Bf16Product& args, int64_t n, int64_t m, const Tile& sums) {
  for (int i = 0; i < kTokens; ++i)
    for (int j = 0; j < kLatents; j += 2) {
      float64x2_t here = vreinterpretq_f64_f32(sums[i][j]), next = vreinterpretq_f64_f32(sums[i][j + 1]);
      int64_t token = n + kRows * i, latent = m + kRows * j, left = args.count - latent;
      bf16* to = args.scores + token * args.count + latent;
      if (token < args.N) put_up_to(vreinterpretq_f32_f64(vzip1q_f64(here, next)), left, to);
      if (token + 1 < args.N) put_up_to(vreinterpretq_f32_f64(vzip2q_f64(here, next)), left, to + args.count);
    }
}

}  // namespace

FASTSPARSE_BFMMLA void bf16_panels_product(const Bf16Product& args, int64_t panel_begin, int64_t panel_end) {
  const int64_t quads = (args.D + kQuad - 1) / kQuad, token_panels = panels(args.N, kTokenPanel);
  for (int64_t p = panel_begin; p < panel_end; ++p)
    for (int64_t column = 0; column < kLatentPanel; column += kWidth) {  // which stays in the cache
      const bf16* latents = args.latents + p * panel_bf16s(args.D, kLatentPanel) + kQuad * column;
      for (int64_t t = 0; t < token_panels; ++t) {
        Tile sums;
        multiply(args.tokens + t * panel_bf16s(args.D, kTokenPanel), latents, quads, sums);
        put(args, t * kTokenPanel, p * kLatentPanel + column, sums);
      }
    }
}

}  // namespace fastsparse::FASTSPARSE_ISA

#endif
