// The LSTM of csrc/cells.h along time.
#pragma once

#include "cpu/gated_recurrence.h"

namespace fastsparse {

// Sequences of one length, where they are more than one.
FASTSPARSE_DECLARE_KERNEL(void lstm_recurrence(const GatedRecurrenceArgs& args, Range sequences, Range channels))

// A sequence's channels, no more than its time_plan. Where it leaves kGivenUp in args.passes states aren't right.
FASTSPARSE_DECLARE_KERNEL(void lstm_recurrence_by_shooting(const GatedRecurrenceArgs& args, int64_t sequence,
                                                           Range channels, void* scratch))
FASTSPARSE_DECLARE_KERNEL(void lstm_recurrence_by_newton(const GatedRecurrenceArgs& args, int64_t sequence,
                                                         Range channels, void* scratch))

}  // namespace fastsparse
