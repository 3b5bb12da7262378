#include "cpu/lstm_recurrence.h"

namespace fastsparse::FASTSPARSE_ISA {

void lstm_recurrence(const GatedRecurrenceArgs& args, Range sequences, Range channels) {
  with_type(args.dtype, [&](auto tag) {
    sequential<LstmCell, typename decltype(tag)::type>(args, sequences, channels);
  });
}

}  // namespace fastsparse::FASTSPARSE_ISA
