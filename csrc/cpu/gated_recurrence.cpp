#include "cpu/gated_recurrence.h"

#include "cpu/gated_solvers.h"

namespace fastsparse::FASTSPARSE_ISA {

namespace {

// Calls f(solver), all in lanes of the type that is computed with.
template <typename F>
void in_time(const GatedRecurrenceArgs& args, int64_t sequence, Range channels, void* scratch, const F& f) {
  with_cell(args.cell, [&]<template <typename> typename Cell>() {
    if (args.dtype == DType::f64) f(InTime<Cell, double>(args, sequence, channels, scratch));
    else f(InTime<Cell, float>(args, sequence, channels, scratch));
  });
}

}  // namespace

void gated_recurrence(const GatedRecurrenceArgs& args, Range sequences, Range channels) {
  with_cell(args.cell, [&]<template <typename> typename Cell>() {
    with_type(args.dtype, [&](auto tag) { sequential<Cell, typename decltype(tag)::type>(args, sequences, channels); });
  });
}

void gated_recurrence_by_shooting(const GatedRecurrenceArgs& args, int64_t sequence, Range channels, void* scratch) {
  in_time(args, sequence, channels, scratch, [](auto solver) { solver.shoot(); });
}

void gated_recurrence_by_newton(const GatedRecurrenceArgs& args, int64_t sequence, Range channels, void* scratch) {
  in_time(args, sequence, channels, scratch, [](auto solver) { solver.newton(); });
}

}  // namespace fastsparse::FASTSPARSE_ISA
