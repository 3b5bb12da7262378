// The gradient of the GRU recurrence: see recurrence_backward.h.
#pragma once

#include "cpu/recurrence_backward.h"

namespace fastsparse {

// For the sequences of a group, and some channels.
FASTSPARSE_DECLARE_KERNEL(void gru_recurrence_backward(const RecurrenceBackwardArgs& args, int64_t group,
                                                        Range sequences, Range channels))

}  // namespace fastsparse
