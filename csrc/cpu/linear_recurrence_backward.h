// The gradient of the linear recurrence, in one pass against time.
//
// What reaches a state in all, lambda[t] = d_h[t] + a[t + 1]^T lambda[t + 1], goes from step to step in registers; then
// d_b[t] = lambda[t] and d_a[t] = lambda[t] h[t - 1]^T. Everything is read or written once: 20 bytes an element-step in
// fp32, 56 a pair.
#pragma once

#include "dtype.h"
#include "cpu/isa.h"
#include "cpu/sequences.h"

namespace fastsparse {

struct LinearRecurrenceBackwardArgs {
  Sequences sequences;
  Series a;       // (B, T, H); of pairs (B, T, 2, 2, H)
  Series h, d_h;  // (B, T, H); of pairs (B, T, 2, H)
  Series h0;      // (S, H), or (S, 2, H) with its `part`, or none: then the first a of a sequence wasn't read
  Series d_a;     // as a, contiguous, written; or none
  Series d_b;     // as h, contiguous, written; or none
  Series d_h0;    // as h0, contiguous, written; or none
  bool pairs, reverse;
  DType dtype;
};

FASTSPARSE_DECLARE_KERNEL(void linear_recurrence_backward(const LinearRecurrenceBackwardArgs& args, int64_t sequence,
                                                           Range channels))

}  // namespace fastsparse
