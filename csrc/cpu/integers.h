// Rows as integers of 12 bits with a scale each, in panels, and the product of two such sets of rows: a screen's scores
// where the processor has no fast product of bf16.
//
// A vector instruction multiplies pairs of 16-bit integers and adds each pair in 32 bits: twice the products of an fp32
// FMA. Sums of kPart products fit in 32 bits and are exact; from there on they are fp32 numbers. What the integers are
// off by is measured row by row, so the bracket of bracket.h holds for them as for bf16.
#pragma once

#include <cstdint>

#include "cpu/rows.h"

namespace fastsparse {

inline constexpr int64_t kTokenPanel = 6, kLatentPanel = 32;  // rows of a panel on either side of a product
inline constexpr int64_t kPart = 512;                         // products in a sum of integers
inline constexpr int32_t kLargestInteger = 2047;
static_assert(kPart * kLargestInteger * kLargestInteger <= INT32_MAX);

// Of a panel: of each pair of columns, the two integers of each row; columns and rows that aren't there are 0.
constexpr int64_t panels(int64_t rows, int64_t height) { return (rows + height - 1) / height; }
constexpr int64_t panel_integers(int64_t D, int64_t height) { return (D + 1) / 2 * 2 * height; }

struct IntegerProduct {
  Rounded tokens, latents;
  int64_t N, count, D;  // of tokens and of latents
  bf16* scores;         // (N, count)
  bool fused;           // by the processor's multiply-add of integers: VPDPWSSD
};

// Panels of `height` rows, of `count` rows in all.
FASTSPARSE_DECLARE_KERNEL(void integers_round(const Rows& rows, int64_t count, int64_t height, const Rounded& to,
                                              int64_t panel_begin, int64_t panel_end))
// Of some of the latents' panels.
FASTSPARSE_DECLARE_KERNEL(void integers_product(const IntegerProduct& args, int64_t panel_begin, int64_t panel_end))

}  // namespace fastsparse
