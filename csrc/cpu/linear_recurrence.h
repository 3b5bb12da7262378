// h[t] = a[t] h[t - 1] + b[t] along time, of single channels or of pairs that 2x2 blocks couple.
#pragma once

#include "dtype.h"
#include "cpu/isa.h"
#include "cpu/sequences.h"

namespace fastsparse {

// Channels that go along together, at most. What is read and written of a step is then in long pieces, best in one that
// follows on that of the step before: a processor fetches ahead what is gone through from end to end, in either direction,
// and that is up to three times as fast as pieces with gaps between them.
inline constexpr int64_t kLinearChannels = 4096;

struct LinearRecurrenceArgs {
  Sequences sequences;
  Series a, b;  // (B, T, H) both; of pairs (B, T, 2, 2, H) and (B, T, 2, H)
  Series h0;    // (S, H), or (S, 2, H) with its `part`, or none: then the first a of a sequence isn't read
  Series h;     // as b, contiguous, written
  bool pairs, reverse;
  DType dtype;
};

FASTSPARSE_DECLARE_KERNEL(void linear_recurrence(const LinearRecurrenceArgs& args, int64_t sequence, Range channels))

}  // namespace fastsparse
