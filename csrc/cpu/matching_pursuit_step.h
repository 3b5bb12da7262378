// A step of matching pursuit: each row takes the atom that explains most of what is left of it.
//
// What decides is the key of pursuit.h. The scores of many rows come from products, which only rule atoms out: the
// library's by their bound, in `sift`; bf16's by `screen` for k = 1. `choose` settles among what these leave.
// A few rows are searched atom by atom, as are those of which too many atoms are left.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "cpu/isa.h"
#include "cpu/matching_pursuit.h"
#include "cpu/screen.h"

namespace fastsparse {

// A dictionary. Atoms promised to be of norm 1 have no squares, no inverse and no scale.
struct Atoms {
  const void* rows;  // (M) atoms `stride` apart, of `dtype`
  int64_t stride, D;
  DType dtype;
  double* squares;  // (M), and
  double* inverse;  // (M), as AtomNorms
  void* scale;      // (M) the inverse in the accumulation type, at most its largest number

  AtomNorms norms() const { return {squares, inverse}; }
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
// No less than the norm of each row; 0 of zeros alone, not finite where the row isn't.
FASTSPARSE_DECLARE_KERNEL(
    void matching_pursuit_step_lengths(const PursuitArgs& args, double* lengths, int64_t row_begin, int64_t row_end))
// best[p, i] of rows i in [0, rows) among the atoms of piece p, which are `grain`, whatever is in them.
FASTSPARSE_DECLARE_KERNEL(void matching_pursuit_step_search(const PursuitArgs& args, int64_t rows, int64_t grain,
                                                            Best* best, int64_t atom_begin, int64_t atom_end))
// A filter of exact scores: lists what may be the best of each row, with its key first; kHopeless where that is too
// much, or a score isn't finite. The rows' lengths are those that matching_pursuit_step_lengths gives.
FASTSPARSE_DECLARE_KERNEL(void matching_pursuit_step_sift(const PursuitArgs& args, const double* lengths,
                                                          const AtomSizes& sizes, const Candidates& candidates,
                                                          const Stripe& stripe, int64_t row_begin, int64_t row_end))
// The atom of each row out of its candidates, of which those below the row's threshold are ruled out; kHopeless where
// there are none.
FASTSPARSE_DECLARE_KERNEL(void matching_pursuit_step_choose(const PursuitArgs& args, const Candidates& candidates,
                                                            int64_t* chosen, int64_t row_begin, int64_t row_end))
// Takes the chosen atom away from each row: indices[i], which a row that takes none gets 0, and its coefficient.
FASTSPARSE_DECLARE_KERNEL(void matching_pursuit_step_take(const PursuitArgs& args, void* values, int64_t* indices,
                                                          int64_t row_begin, int64_t row_end))

}  // namespace fastsparse
