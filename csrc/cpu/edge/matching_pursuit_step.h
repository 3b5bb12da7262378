// Steps of matching pursuit, each by a product of the residuals and the dictionary.
#pragma once

#include <optional>
#include <vector>

#include "cpu/edge/scorer.h"
#include "cpu/matching_pursuit_step.h"

namespace fastsparse::edge {

// A dictionary (M, D) of any strides and dtype, and what is made of it once for all steps of a call.
class PursuitSteps {
 public:
  PursuitSteps(const Tensor& dictionary, bool nonnegative, bool normalized);

  // One step of each of `count` rows of residual (..., D), contiguous and of the accumulation type, in place: the rows
  // listed in `rows`, or 0, 1, 2, ... where that is null. The step of the i-th of them goes to values[i], of the
  // accumulation type, and indices[i]; both are 0 where none was to be taken.
  void take(void* residual, const int64_t* rows, int64_t count, void* values, int64_t* indices);

 private:
  // Ways to choose the atoms of some rows, each of which leaves what it can't decide to the next.
  void screen(const PursuitArgs& args, int64_t rows, int64_t* chosen);
  void plain(const PursuitArgs& args, int64_t rows, int64_t* chosen);
  void search(const PursuitArgs& args, int64_t rows, int64_t* chosen);
  void rescue(PursuitArgs args, int64_t count, int64_t* chosen,
              void (PursuitSteps::*choose)(const PursuitArgs&, int64_t, int64_t*));
  bool trusts_product();
  Residuals from(int64_t i, Residuals residuals) const;
  Rows rows_of(const PursuitArgs& args) const;

  bool nonnegative_;
  Scorer scorer_;
  Atoms atoms_;
  DType accumulator_;
  int64_t accumulator_bytes_;
  AtomSizes sizes_;
  std::optional<bool> trusted_;
  Scratch squares_, inverse_, lengths_;
};

}  // namespace fastsparse::edge
