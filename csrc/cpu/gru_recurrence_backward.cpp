#include "cpu/gru_recurrence_backward.h"

namespace fastsparse::FASTSPARSE_ISA {

void gru_recurrence_backward(const RecurrenceBackwardArgs& args, int64_t group, Range sequences, Range channels) {
  recurrence_backward<GruCell, 1>(args, group, sequences, channels);
}

}  // namespace fastsparse::FASTSPARSE_ISA
