#include "cpu/gated_recurrence.h"

#include "cpu/gated_solvers.h"

namespace fastsparse::FASTSPARSE_ISA {

namespace {

// Calls f.operator()<Cell, T>().
template <typename F> void with_cell_and_type(const GatedRecurrenceArgs& args, const F& f) {
  with_cell(args.cell, [&]<template <typename> typename Cell>() {
    with_type(args.dtype, [&](auto tag) { f.template operator()<Cell, typename decltype(tag)::type>(); });
  });
}

}  // namespace

void gated_recurrence(const GatedRecurrenceArgs& args, Range sequences, Range channels) {
  with_cell_and_type(args, [&]<template <typename> typename Cell, typename T>() {
    sequential<Cell, T>(args, sequences, channels);
  });
}

void gated_recurrence_by_shooting(const GatedRecurrenceArgs& args, int64_t sequence, Range channels, void* scratch) {
  with_cell_and_type(args, [&]<template <typename> typename Cell, typename T>() {
    InTime<Cell, T>(args, sequence, channels, scratch).shoot();
  });
}

void gated_recurrence_by_newton(const GatedRecurrenceArgs& args, int64_t sequence, Range channels, void* scratch) {
  with_cell_and_type(args, [&]<template <typename> typename Cell, typename T>() {
    InTime<Cell, T>(args, sequence, channels, scratch).newton();
  });
}

}  // namespace fastsparse::FASTSPARSE_ISA
