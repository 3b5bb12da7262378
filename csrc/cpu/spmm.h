// out[n] = sum_j values[n, j] * weight[indices[n, j]].
#pragma once

#include <cstdint>

#include "dtype.h"
#include "cpu/fetch.h"
#include "cpu/isa.h"

namespace fastsparse {

struct SpmmArgs {
  const void* values;      // (N, k) of the accumulation type
  const int64_t* indices;  // (N, k), checked
  const void* weight;      // (M, D) with rows weight_stride apart
  void* out;               // (N, D)
  int64_t k, D, weight_stride;
  DType dtype;             // of weight and out
  Fetch fetch;             // by whether the rows that are used fit into the cache together
};

FASTSPARSE_DECLARE_KERNEL(void spmm(const SpmmArgs& args, Range columns, int64_t row_begin, int64_t row_end))

}  // namespace fastsparse
