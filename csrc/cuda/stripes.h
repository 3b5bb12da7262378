// How encoders take a call apart: blocks of rows (tokens), and stripes of latents whose scores stay in the L2 cache.
#pragma once

#include <algorithm>

#include "cuda/edge.h"
#include "cuda/knobs.h"

namespace fastsparse::cuda {

inline constexpr int64_t kMostRows = 8192;                     // tokens at a time
inline constexpr int64_t kScoreBytes = int64_t{32} << 20;      // of scores at a time: they stay in the L2 cache
inline constexpr int64_t kTileRows = 128, kTileLatents = 256;  // of the vendor's products
inline constexpr int64_t kStripeStep = 512;                    // latents that a stripe is a multiple of
inline constexpr int64_t kSplitLatents = 2048;                 // a part that keeps a warp busy for long enough

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline Tensor rows_of(const Tensor& tensor, int64_t begin, int64_t count) {
  Tensor whole = tensor;
  return torch::stable::narrow(whole, 0, begin, count);
}

// Of N rows, at most `most` of which are taken at a time, so many that no block is much smaller.
inline int64_t block_rows(int64_t N, int64_t most) {
  most = std::min(knobs.rows ? knobs.rows : kMostRows, most);
  return std::min(N, round_up(ceil_div(N, ceil_div(N, most)), most >= 1024 ? kTileRows : 1));
}

// The stripe, in whole groups of the M latents, whose scores for a block of rows, of type C, fit and whose product's
// tiles, in waves over the multiprocessors, leave the least idle.
template <typename C> int64_t stripe_latents(const Call& call, int64_t rows, int64_t M, int64_t group) {
  int64_t bytes = knobs.bytes ? knobs.bytes : kScoreBytes;
  int64_t most = std::max<int64_t>(bytes / int64_t(sizeof(C)) / rows / kStripeStep, 1) * kStripeStep, best = most;
  if (M <= most) return round_up(M, group);
  double best_use = 0;
  for (int64_t latents = most; latents * 2 > most; latents -= kStripeStep) {
    int64_t tiles = ceil_div(rows, kTileRows) * (latents / kTileLatents);
    double use = double(tiles) / double(round_up(tiles, call.multiprocessors()));
    if (use > best_use * 1.02) best_use = use, best = latents;
  }
  return best;
}

// How many parts a stripe is cut into, each a warp's work in every row. Few rows are split among more warps: 16 a
// multiprocessor, each 2 kB at a time, keep its share of L2 busy.
inline int64_t stripe_splits(const Call& call, int64_t rows, int64_t stripe) {
  return std::max<int64_t>(1, std::min(ceil_div(16 * call.multiprocessors(), rows), stripe / kSplitLatents));
}

// A stripe's scores (rows, count) in memory whose rows are `stripe` apart, a whole number of groups.
inline Tensor scores_of(const Tensor& memory, int64_t rows, int64_t count, int64_t stripe) {
  return torch::stable::from_blob(memory.mutable_data_ptr(), {rows, count}, {stripe, 1}, memory.device(),
                                  memory.scalar_type());
}

}  // namespace fastsparse::cuda
