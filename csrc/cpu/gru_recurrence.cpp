#include "cpu/gru_recurrence.h"

namespace fastsparse::FASTSPARSE_ISA {

void gru_recurrence(const GatedRecurrenceArgs& args, Range sequences, Range channels) {
  with_type(args.dtype, [&](auto tag) {
    sequential<GruCell, typename decltype(tag)::type>(args, sequences, channels);
  });
}

}  // namespace fastsparse::FASTSPARSE_ISA
