// A step of matching pursuit: each row takes the atom that explains most of what is left of it.
//
// The scores of many rows come from products and pass through topk_encode's kernels for k = 1, the candidates' keys
// being |w.r| / |w|; `choose` settles among what these leave. A few rows are searched atom by atom.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "cpu/isa.h"
#include "cpu/topk_encode.h"

namespace fastsparse {

// A dictionary. Atoms promised to be of norm 1 have no `squares` and no `inverse`.
struct Atoms {
  const void* rows;  // (M) atoms `stride` apart, of `dtype`
  int64_t stride, D;
  DType dtype;
  double* squares;  // (M) |atom|^2
  void* inverse;    // (M) 1 / |atom| in the accumulation type, at most its largest number; 0 of a zero atom
};

// Residuals, contiguous and of the accumulation type: row i of a call is number rows[i] of them.
struct Residuals {
  void* data;
  const int64_t* rows;  // null for 0, 1, 2, ...
};

// The best atom of some; -1 where there is none but zero atoms.
struct Best {
  double key;
  int64_t atom;
};

struct PursuitArgs {
  Atoms atoms;
  Residuals residuals;
  bool nonnegative;
};

FASTSPARSE_DECLARE_KERNEL(void matching_pursuit_step_norms(const Atoms& atoms, int64_t begin, int64_t end))
// Whether each row is finite.
FASTSPARSE_DECLARE_KERNEL(
    void matching_pursuit_step_finite(const PursuitArgs& args, bool* finite, int64_t row_begin, int64_t row_end))
// best[i] of rows [0, rows) among the atoms [atom_begin, atom_end), whatever is in them.
FASTSPARSE_DECLARE_KERNEL(void matching_pursuit_step_search(const PursuitArgs& args, int64_t rows, int64_t atom_begin,
                                                            int64_t atom_end, Best* best))
// The atom of each row out of its candidates, whose keys are exact or only bounds of them; kHopeless where the screen
// can't decide.
FASTSPARSE_DECLARE_KERNEL(void matching_pursuit_step_choose(const PursuitArgs& args, const Candidates& candidates,
                                                            bool exact, int64_t* chosen, int64_t row_begin,
                                                            int64_t row_end))
// Takes the chosen atom away from each row: indices[i], which a row that takes none gets 0, and its coefficient.
FASTSPARSE_DECLARE_KERNEL(void matching_pursuit_step_take(const PursuitArgs& args, void* values, int64_t* indices,
                                                          int64_t row_begin, int64_t row_end))

}  // namespace fastsparse
