// Scores of many rows and latents, stripe by stripe of latents, and what they leave of these: candidates.
//
// A filter streams a stripe's scores through a buffer for each row that holds the best so far. `screen` does so with bf16
// scores and rigorous brackets around the exact ones. Derivation of the bracket: see bracket.h.
#pragma once

#include <cstdint>

#include "cpu/rows.h"

namespace fastsparse {

// The latents' terms of the bracket, each times |scale|.
struct Brackets {
  const float* norm = nullptr;      // (count) |w~|
  const float* residual = nullptr;  // (count) |w - w~| + tiny
  const float* rest = nullptr;      // (count) the bias's rounding + tiny
  float most_norm = 0, most_residual = 0, most_rest = 0;  // their maxima, infinite where one isn't finite
};

// The scores of one stripe, and what belongs to its latents; vectors over these can be read up to a whole SIMD vector
// past their end.
struct Stripe {
  int64_t begin = 0, count = 0;    // eligible latents [begin, begin + count)
  bool doubled = false;            // twice as many latents have been seen as when the thresholds were last raised
  const void* scores = nullptr;    // (rows, count) of the accumulation type; of a screen, bf16
  const void* bias = nullptr;      // (count) of the accumulation type
  const void* scale = nullptr;     // (count) or null
  // Of a screen alone:
  int64_t D = 0;
  const float* x_norm = nullptr;      // (rows) |x~|
  const float* x_residual = nullptr;  // (rows) |x - x~|
  Brackets brackets = {};
};

// The candidates of every row, in the order of their latents while they are screened. A row's list is compacted to what
// can still win whenever it fills.
struct Candidates {
  int64_t k, capacity;
  bool absolute;    // select on |score|
  DType dtype;      // the accumulation type
  void* lists;      // (N, list_bytes). A row's three columns lie together: two of numbers of `dtype` (key and score; in a
                    // screen the key's upper and lower bound), and one of positions among the eligible latents
  int32_t* count;   // (N), or kHopeless: the screen can't decide this row
  void* threshold;  // (N) of `dtype`: a lower bound on the row's k-th largest key
};
inline constexpr int32_t kHopeless = -1;
inline constexpr int64_t kSlack = 32;  // room behind a full column for one more vector, and what its store overwrites
constexpr int64_t list_bytes(int64_t capacity, int64_t number_bytes) {
  return ((capacity + kSlack) * (2 * number_bytes + 4) + 63) / 64 * 64;  // every list begins a cache line
}

// What is scored exactly of what a screen has left.
struct RefineArgs {
  int64_t N;
  Rows x, weight;      // the weight's of the eligible latents
  const float* bias;   // by eligible position
  const float* scale;  // or null
};

// Keeps what may be among the k largest of each row.
FASTSPARSE_DECLARE_KERNEL(void screen(const Candidates& candidates, const Stripe& stripe, int64_t row_begin, int64_t row_end))
// Drops the candidates that can't win by the final bound.
FASTSPARSE_DECLARE_KERNEL(void screen_certify(const Candidates& candidates, int64_t row_begin, int64_t row_end))

}  // namespace fastsparse
