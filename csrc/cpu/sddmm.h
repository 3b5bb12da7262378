// out[n, j] = <x[n], weight[indices[n, j]]>.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "cpu/isa.h"

namespace fastsparse {

struct SddmmArgs {
  const void* x;           // (N, D) with rows x_stride apart
  const void* weight;      // (M, D) with rows weight_stride apart
  const int64_t* indices;  // (N, k), checked
  void* out;               // (N, k)
  int64_t k, D, x_stride, weight_stride;
  DType dtype;
};

FASTSPARSE_DECLARE_KERNEL(void sddmm(const SddmmArgs& args, int64_t row_begin, int64_t row_end))

}  // namespace fastsparse
