// out[n, j] = <x[n], weight[indices[n, j]]>, of rows of k entries, or of entries offsets[n] up to offsets[n + 1].
#pragma once

#include <cstdint>

#include "dtype.h"
#include "cpu/isa.h"

namespace fastsparse {

struct SddmmArgs {
  const void* x;           // (N, D) with rows x_stride apart
  const void* weight;      // (M, D) with rows weight_stride apart
  const int64_t* indices;  // (N, k) or (E), checked
  const int64_t* offsets;  // (N + 1), checked, or null
  void* out;               // as indices
  int64_t N, k, D, x_stride, weight_stride;
  DType dtype;
};

// Rows of k entries.
FASTSPARSE_DECLARE_KERNEL(void sddmm(const SddmmArgs& args, int64_t row_begin, int64_t row_end))
// Entries of rows between offsets.
FASTSPARSE_DECLARE_KERNEL(void sddmm_ragged(const SddmmArgs& args, int64_t begin, int64_t end))

}  // namespace fastsparse
