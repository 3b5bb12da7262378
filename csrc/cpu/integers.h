// Rows as integers of up to 14 bits with a scale each, in panels, and the product of two such sets of rows: a screen's
// scores where the processor has no fast product of bf16.
//
// A vector instruction multiplies pairs of 16-bit integers and adds each pair in 32 bits: twice the products of an fp32
// FMA. Sums wrap around, but no score is longer than kLongest^2, which fits, so scores are exact, and may be had by
// Strassen's product (strassen.h), which leaves out a quarter of the multiplications. What the integers are off by is
// measured row by row, so the bracket of bracket.h holds for them as for bf16.
#pragma once

#include <cstdint>

#include "cpu/rows.h"
#include "cpu/strassen.h"

namespace fastsparse {

inline constexpr int64_t kTokenPanel = 6, kLatentPanel = 32;  // rows of a panel on either side of a product
inline constexpr int32_t kLargestInteger = 8191;
inline constexpr double kLongest = 46340;  // of rows of integers, by their norm
static_assert(kLongest * kLongest <= INT32_MAX && strassen::kSide * kLargestInteger <= INT16_MAX);

constexpr int64_t panels(int64_t rows, int64_t height) { return (rows + height - 1) / height; }
// Integers come in groups of as many panels as Strassen's matrices have rows of parts, and a panel's columns in as many
// parts, each of so many pairs of columns. Of a pair it holds the two integers of each row; columns and rows that
// aren't there are 0.
constexpr int64_t groups(int64_t rows, int64_t height) { return panels(rows, strassen::kSide * height); }
constexpr int64_t pairs_of_part(int64_t D) { return (D + 2 * strassen::kSide - 1) / (2 * strassen::kSide); }
constexpr int64_t part_integers(int64_t D, int64_t height) { return 2 * pairs_of_part(D) * height; }
constexpr int64_t panel_integers(int64_t D, int64_t height) { return strassen::kSide * part_integers(D, height); }
// Of a group's tokens: the left side of each of Strassen's products.
constexpr int64_t combined_integers(int64_t D) { return strassen::kProducts * part_integers(D, kTokenPanel); }

struct IntegerProduct {
  const int16_t* tokens;      // panels or, for Strassen's product, combined
  bool combined;
  const float* token_scale;   // (N)
  const int16_t* latents;     // panels
  const float* latent_scale;  // (count)
  int64_t N, count, D;        // of tokens and of latents
  bf16* scores;               // (N, count)
  bool fused;                 // by the processor's multiply-add of integers: VPDPWSSD
};

// Panels of `height` rows, of `count` rows in all.
FASTSPARSE_DECLARE_KERNEL(void integers_round(const Rows& rows, int64_t count, int64_t height, const Rounded& to,
                                              int64_t panel_begin, int64_t panel_end))
// Panels of tokens to what a product takes; of some groups.
FASTSPARSE_DECLARE_KERNEL(void integers_combine(const int16_t* tokens, int64_t D, int16_t* combined, int64_t group_begin,
                                                int64_t group_end))
// Of some of the latents' groups.
FASTSPARSE_DECLARE_KERNEL(void integers_product(const IntegerProduct& args, int64_t group_begin, int64_t group_end))

}  // namespace fastsparse
