// What the solvers of the gated recurrences have in common on every backend (fastsparse/reference/_solvers.py says what
// they do): when a channel of a sequence is solved, and what is said of it. Python's numbers stand in
// fastsparse/_options.py; a test holds the two against one another.
#pragma once

#include "options.h"

#include "inline.h"

namespace fastsparse {

inline constexpr int kNewtonPasses = 12, kShootingPasses = 8;  // at most

// A state is certified where what it may be off by is at most this, beside the state or 1: 32 eps.
template <typename C> inline constexpr C kSmall = C(0x1p-18);
template <> inline constexpr double kSmall<double> = 0x1p-47;

// What shooting's chunks are run once more for, from starts so corrected, although they are certified: states are then
// off by what is of second order in it.
template <typename C> inline constexpr C kNegligible = kSmall<C> / 16;

// How far rounding errors may spread in what is certified: the variance of a channel's states, of a pair the sum of both,
// if every step adds an independent error of variance 1 to each. What they add up to is then within 2^13 of them, however
// they go together, and mostly of the order of 64 (fastsparse/reference/_solvers.py).
inline constexpr int kMostSpread = 1 << 12;

// The covariance of the errors of n states, symmetric: (v), or (v00, v01, v11).
template <int n> inline constexpr int kCovariance = n * (n + 1) / 2;

// J v J^T in place of v.
template <int n, typename V>
FASTSPARSE_INLINE void carry_errors(const V (&J)[n * n], V (&v)[kCovariance<n>]) {
  if constexpr (n == 1) {
    v[0] = J[0] * J[0] * v[0];
  } else {
    V first = J[0] * v[0] + J[1] * v[1], both = J[0] * v[1] + J[1] * v[2];
    V other = J[2] * v[0] + J[3] * v[1], second = J[2] * v[1] + J[3] * v[2];
    v[0] = J[0] * first + J[1] * both;
    v[1] = J[2] * first + J[3] * both;
    v[2] = J[2] * other + J[3] * second;
  }
}

// One error more of each state.
template <int n, typename V> FASTSPARSE_INLINE void add_errors(V (&v)[kCovariance<n>]) {
  v[0] = v[0] + 1;
  if constexpr (n == 2) v[2] = v[2] + 1;
}

template <int n, typename V> FASTSPARSE_INLINE V trace(const V (&v)[kCovariance<n>]) {
  if constexpr (n == 1) return v[0];
  else return v[0] + v[2];
}

// What `passes` says of a channel of a sequence, where it isn't the pass that certified it.
inline constexpr int kNoPasses = 0;  // step by step, as asked
inline constexpr int kGivenUp = -1;  // not certified, hence step by step

}  // namespace fastsparse
