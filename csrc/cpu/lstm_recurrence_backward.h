// The gradient of the LSTM recurrence: see recurrence_backward.h.
#pragma once

#include "cpu/recurrence_backward.h"

namespace fastsparse {

// For the sequences of a group, and some channels.
FASTSPARSE_DECLARE_KERNEL(void lstm_recurrence_backward(const RecurrenceBackwardArgs& args, int64_t group,
                                                        Range sequences, Range channels))

}  // namespace fastsparse
