// Matching pursuit by the Gram matrix G of the atoms: the scores s = a.r of a row once, then s -= c G[j] for every atom
// j that is taken. What is scored are the atoms over their norms, so that |s| alone decides; or the atoms as they are,
// where norm 1 was promised. Scores only choose: see `error bound` in matching_pursuit.cpp.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "cpu/isa.h"

namespace fastsparse {

// By which keys and coefficients are made of products with atoms; both null where norm 1 was promised.
struct AtomNorms {
  const double* squares = nullptr;  // (M) |atom|^2
  const double* inverse = nullptr;  // (M) 1 / |atom|; 0 of a zero atom
};

// What is made of every atom.
struct PrepareArgs {
  const void* rows;  // (M, D), rows `stride` apart, of `dtype`
  int64_t stride, D;
  DType dtype;
  bool normalized;
  void* copy;        // (M, D) of `dtype`
  void* scored;      // (M, D) of the accumulation type: over its norm, or as it is; null where `copy` serves
  double* squares;   // (M) |atom|^2
  double* inverse;   // (M) 1 / |atom|; 0 of a zero atom
};

// A stripe of products of atoms [begin, begin + count) with atoms [begin, M), which goes into the Gram matrix twice.
struct SpreadArgs {
  const void* stripe;  // (count, M - begin) of the accumulation type
  int64_t begin, count, M, gram_stride;
  void* gram;          // (M, M), rows gram_stride apart
  DType accumulator;
};

// The atoms' sizes, as the error bound wants them.
struct AtomSizes {
  double largest = 0;      // norm of what is scored
  double largest_raw = 0;  // norm of an atom as it is
  double smallest = 1;     // norm that a product is divided by
  bool regular = true;     // the squares of all are 0 or well within fp64's range
};

struct GramPursuitArgs {
  int64_t M, D, k;
  double tol;
  bool nonnegative;
  const void* atoms;      // (M, D) of `dtype`
  AtomNorms norms;
  AtomSizes sizes;
  const void* gram;       // (M, M) of the accumulation type, rows gram_stride apart, which is whole vectors
  int64_t gram_stride;
  const void* x;          // (N, D) of `dtype`, rows x_stride apart
  int64_t x_stride;
  const void* scores;     // (N, M) of the accumulation type
  void* values;           // (N, k) of `dtype`
  int64_t* indices;       // (N, k)
  void* residual;         // (N, D) of `dtype`
  DType dtype;
};

// Norms of rows, for a tolerance.
struct LengthArgs {
  const void* rows;      // (..., D) of the accumulation type
  const int64_t* order;  // which rows
  int64_t D;
  double* lengths;
  DType accumulator;
};

FASTSPARSE_DECLARE_KERNEL(void matching_pursuit_prepare(const PrepareArgs& args, int64_t begin, int64_t end))
// Columns [begin, end) of the stripe; `begin` a multiple of 16.
FASTSPARSE_DECLARE_KERNEL(void matching_pursuit_spread(const SpreadArgs& args, int64_t begin, int64_t end))
FASTSPARSE_DECLARE_KERNEL(void matching_pursuit_lengths(const LengthArgs& args, int64_t begin, int64_t end))
FASTSPARSE_DECLARE_KERNEL(void matching_pursuit(const GramPursuitArgs& args, int64_t row_begin, int64_t row_end))

}  // namespace fastsparse
