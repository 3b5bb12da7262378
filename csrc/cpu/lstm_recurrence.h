// The LSTM of csrc/cells.h along time.
#pragma once

#include "cpu/gated_recurrence.h"

namespace fastsparse {

// Sequences of one length, where they are more than one.
FASTSPARSE_DECLARE_KERNEL(void lstm_recurrence(const GatedRecurrenceArgs& args, Range sequences, Range channels))

}  // namespace fastsparse
