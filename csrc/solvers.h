// What the solvers of the gated recurrences have in common on every backend (fastsparse/reference/_solvers.py says what
// they do): when a channel of a sequence is solved, and what is said of it.
#pragma once

#include "options.h"

namespace fastsparse {

inline constexpr int kNewtonPasses = 12, kShootingPasses = 8;  // at most

// A state is certified where what it may be off by is at most this, beside the state or 1: 32 eps.
template <typename C> inline constexpr C kSmall = C(0x1p-18);
template <> inline constexpr double kSmall<double> = 0x1p-47;

// What shooting's chunks are run once more for, from starts so corrected, although they are certified: states are then
// off by what is of second order in it.
template <typename C> inline constexpr C kNegligible = kSmall<C> / 16;

// How much a rounding error may grow, from a chunk's start to any later state, in what shooting certifies. Its states
// are rounded elsewhere than those taken step by step; where the two part, chunks fit together all the same.
inline constexpr int kMostGrowth = 1 << 13;

// What `passes` says of a channel of a sequence, where it isn't the pass that certified it.
inline constexpr int kNoPasses = 0;  // step by step, as asked
inline constexpr int kGivenUp = -1;  // not certified, hence step by step

}  // namespace fastsparse
