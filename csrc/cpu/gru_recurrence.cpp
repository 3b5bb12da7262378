#include "cpu/gru_recurrence.h"

#include "cpu/gated_solvers.h"

namespace fastsparse::FASTSPARSE_ISA {

void gru_recurrence(const GatedRecurrenceArgs& args, Range sequences, Range channels) {
  with_type(args.dtype, [&](auto tag) {
    sequential<GruCell, typename decltype(tag)::type>(args, sequences, channels);
  });
}

void gru_recurrence_by_shooting(const GatedRecurrenceArgs& args, int64_t sequence, Range channels, void* scratch) {
  with_type(args.dtype, [&](auto tag) {
    InTime<GruCell, typename decltype(tag)::type>(args, sequence, channels, scratch).shoot();
  });
}

void gru_recurrence_by_newton(const GatedRecurrenceArgs& args, int64_t sequence, Range channels, void* scratch) {
  with_type(args.dtype, [&](auto tag) {
    InTime<GruCell, typename decltype(tag)::type>(args, sequence, channels, scratch).newton();
  });
}

}  // namespace fastsparse::FASTSPARSE_ISA
