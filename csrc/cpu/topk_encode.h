// The k largest of x @ weight.T + bias per row: screen, certify, refine.
//
// Work goes stripe by stripe of eligible latents. `plain` streams exact scores through a per-row buffer that holds the
// best so far. `screen` does so with bf16 scores and rigorous brackets around the exact ones; what survives is scored
// exactly by `refine`. Derivation of the bracket: see `error bracket` in topk_encode.cpp.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "options.h"
#include "cpu/isa.h"

namespace fastsparse {

// Rows as bf16, with the norms that the bracket needs.
struct RoundArgs {
  const void* rows;      // rows `stride` apart, of `dtype`
  const int64_t* order;  // which rows; null for 0, 1, 2, ...
  int64_t stride, D;
  DType dtype;
  bf16* rounded;         // (count, D)
  float* norm;           // (count) |rounded row|
  float* residual;       // (count) |row - rounded row|
};

// Rows of any type as fp32 (fp64 stays): the product's input where it can't be the tensor itself.
struct WidenArgs {
  const void* rows;
  const int64_t* order;
  int64_t stride, D;
  DType dtype;
  void* widened;         // (count, D) of the accumulation type
};

// Scores of few tokens straight from storage types that the product has no fp32 result for.
struct ScoreArgs {
  const void* x;           // (N) rows x_stride apart, of `dtype`
  const void* weight;      // rows weight_stride apart
  const int64_t* order;    // which rows of the weight; null for 0, 1, 2, ...
  int64_t N, D, x_stride, weight_stride, count;
  DType dtype;
  float* scores;           // (N, count)
};

// Per-latent terms of one stripe; the vectors can be read up to a whole SIMD vector past its end.
struct Stripe {
  int64_t begin = 0, count = 0;    // eligible latents [begin, begin + count); also the width of its scores
  bool doubled = false;            // twice as many latents have been seen as when the thresholds were last raised
  const void* bias = nullptr;      // (count) of the accumulation type
  const void* scale = nullptr;     // (count) or null
  // Of a screen alone, each times |scale|:
  const float* norm = nullptr;      // (count) |w~|
  const float* residual = nullptr;  // (count) |w - w~| + tiny
  const float* rest = nullptr;      // (count) the bias's rounding + tiny
  float most_norm = 0, most_residual = 0, most_rest = 0;  // their maxima, infinite where one isn't finite
};

// The candidates of every row, in the order of their latents while they are screened. A row's list is compacted to what
// can still win whenever it fills.
struct Candidates {
  int64_t k, capacity;
  bool absolute;    // select on |score|
  void* lists;      // (N, list_bytes). A row's three columns lie together: two of numbers, of the accumulation type
                    // (key and score; in a screen the key's upper and lower bound), and one of positions among the
                    // eligible latents
  int32_t* count;   // (N), or kHopeless: the screen can't decide this row
  void* threshold;  // (N) of the accumulation type: a lower bound on the row's k-th largest key
};
inline constexpr int32_t kHopeless = -1;
inline constexpr int64_t kSlack = 32;  // room behind a full column for one more vector, and what its store overwrites
constexpr int64_t list_bytes(int64_t capacity, int64_t number_bytes) {
  return ((capacity + kSlack) * (2 * number_bytes + 4) + 63) / 64 * 64;  // every list begins a cache line
}

struct PlainArgs {
  Candidates candidates;
  Stripe stripe;
  const void* scores;    // (N, count) of the accumulation type
  DType accumulator;
};

struct ScreenArgs {
  Candidates candidates;
  Stripe stripe;
  const bf16* scores;
  const float* x_norm;      // (N) |x~|
  const float* x_residual;  // (N) |x - x~|
  int64_t D;
};

struct RefineArgs {
  Candidates candidates;    // bounds become key and score
  int64_t N, D;
  const void* x;
  const void* weight;
  int64_t x_stride, weight_stride;
  const int64_t* eligible;  // null for all
  const float* bias;        // by eligible position, or null
  const float* scale;
  DType dtype;
};

struct SelectArgs {
  Candidates candidates;
  const int64_t* eligible;
  const int64_t* order;     // output row of each row; null for 0, 1, 2, ...
  Activation activation;
  void* values;             // (N, k) of dtype
  int64_t* indices;
  DType dtype;
};

FASTSPARSE_DECLARE_KERNEL(void topk_encode_round(const RoundArgs& args, int64_t begin, int64_t end))
FASTSPARSE_DECLARE_KERNEL(void topk_encode_widen(const WidenArgs& args, int64_t begin, int64_t end))
FASTSPARSE_DECLARE_KERNEL(void topk_encode_score(const ScoreArgs& args, int64_t latent_begin, int64_t latent_end))
FASTSPARSE_DECLARE_KERNEL(void topk_encode_plain(const PlainArgs& args, int64_t row_begin, int64_t row_end))
FASTSPARSE_DECLARE_KERNEL(void topk_encode_screen(const ScreenArgs& args, int64_t row_begin, int64_t row_end))
// Drops the candidates that can't win by the final bound; must run on every row before `refine`.
FASTSPARSE_DECLARE_KERNEL(void topk_encode_certify(const Candidates& candidates, int64_t row_begin, int64_t row_end))
// Exact scores of the candidates whose latent lies in [latent_begin, latent_end): latent-major, so that a row of the
// weight is read once for all the tokens that want it.
FASTSPARSE_DECLARE_KERNEL(void topk_encode_refine(const RefineArgs& args, int64_t latent_begin, int64_t latent_end))
FASTSPARSE_DECLARE_KERNEL(void topk_encode_select(const SelectArgs& args, int64_t row_begin, int64_t row_end))

}  // namespace fastsparse
