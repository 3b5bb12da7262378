// The product of two sets of rows as bf16 in panels: a screen's scores on Arm, where the processor multiplies 2 x 4 by
// 4 x 2 of them in an instruction, BFMMLA, which is four times the products of an fp32 FMA. bracket.h has its error.
#pragma once

#include <cstdint>

#include "cpu/integers.h"

namespace fastsparse {

// Where there is such a product at all; whether this processor has it is cpu_features().fast_bf16.
#if defined(__aarch64__)
inline constexpr bool kBf16Panels = true;
#else
inline constexpr bool kBf16Panels = false;
#endif

// Of a panel: of each four columns, the four numbers of each row. Columns that aren't there are 0; what is in rows that
// aren't there goes into no score. The panels are as high as those of integers.
inline constexpr int64_t kQuad = 4;
constexpr int64_t panel_bf16s(int64_t D, int64_t height) { return (D + kQuad - 1) / kQuad * kQuad * height; }

struct Bf16Product {
  const bf16 *tokens, *latents;  // panels
  int64_t N, count, D;           // of tokens and of latents
  bf16* scores;                  // (N, count)
};

// Of some of the latents' panels. Rows come into panels by rows_round.
FASTSPARSE_DECLARE_KERNEL(void bf16_panels_product(const Bf16Product& args, int64_t panel_begin, int64_t panel_end))

}  // namespace fastsparse
