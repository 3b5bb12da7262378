// out[m] = sum of values[n, j] * x[n] over the entries with indices[n, j] = m, in the order of (n, j).
//
// The code comes sorted by latent. A latent's list is cut into segments of at most kSegment entries; a hot latent has
// several, which run in parallel into scratch rows and are added up in order. Where the cuts lie depends on the list
// alone: the result is the same for any number of threads.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "cpu/isa.h"

namespace fastsparse {

inline constexpr int64_t kSegment = 1024;

struct SpmmTArgs {
  const void* values;     // (nnz) of the accumulation type, latent-major
  const int64_t* rows;    // (nnz) token of each entry, latent-major
  const int64_t* offsets; // (M + 1) where each latent's entries begin
  const void* x;          // (N, D) with rows x_stride apart
  void* out;              // (M, D)
  int64_t D, x_stride;
  DType dtype;            // of x and out
  bool cached;            // whether x fits into the cache
};

struct Hot {
  int64_t latent, begin, end;  // and its segments
};

// Latents with at most one segment, straight into out; zero where a latent has no entry.
FASTSPARSE_DECLARE_KERNEL(void spmm_t(const SpmmTArgs& args, int64_t latent_begin, int64_t latent_end))
// Segments of hot latents, each into its row of partial sums, (segments, D) of the accumulation type.
FASTSPARSE_DECLARE_KERNEL(void spmm_t_segments(const SpmmTArgs& args, const Range* segments, void* partials,
                                               int64_t begin, int64_t end))
// The sums of hot latents' partial sums.
FASTSPARSE_DECLARE_KERNEL(void spmm_t_join(const SpmmTArgs& args, const Hot* hot, const void* partials, int64_t hot_begin,
                                           int64_t hot_end))

}  // namespace fastsparse
