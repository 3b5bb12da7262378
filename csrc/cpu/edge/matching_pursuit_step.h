// Steps of matching pursuit, each by a product of the residuals and the dictionary.
#pragma once

#include <memory>

#include "cpu/edge/edge.h"

namespace fastsparse::edge {

// A dictionary (M, D) of any strides and dtype, and what is made of it once for all steps of a call.
class PursuitSteps {
 public:
  PursuitSteps(const Tensor& dictionary, bool nonnegative, bool normalized);
  ~PursuitSteps();

  // One step of each of `count` rows of residual (..., D), contiguous and of the accumulation type, in place: the rows
  // listed in `rows`, or 0, 1, 2, ... where that is null. The step of the i-th of them goes to values[i], of the
  // accumulation type, and indices[i]; both are 0 where none was to be taken.
  void take(void* residual, const int64_t* rows, int64_t count, void* values, int64_t* indices);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace fastsparse::edge
