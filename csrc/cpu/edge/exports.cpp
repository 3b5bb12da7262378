// What Python calls through ctypes: the instruction-set level, what is known of build and CPU, and for tests the knobs.
#include "cpu/isa.h"
#include "host/facts.h"

#include "cpu/edge/knobs.h"

namespace fastsparse::edge {
Knobs knobs;
}  // namespace fastsparse::edge

#define FASTSPARSE_EXPORT extern "C" __attribute__((visibility("default")))

FASTSPARSE_EXPORT int fastsparse_cpu_level() { return int(fastsparse::current_isa()); }
FASTSPARSE_EXPORT int fastsparse_cpu_best_level() { return int(fastsparse::best_isa()); }
FASTSPARSE_EXPORT void fastsparse_cpu_set_level(int level) { fastsparse::set_isa(fastsparse::Isa(level)); }
FASTSPARSE_EXPORT const char* fastsparse_build_facts() { return fastsparse::build_facts(); }
FASTSPARSE_EXPORT const char* fastsparse_cpu_facts() { return fastsparse::cpu_facts(); }
FASTSPARSE_EXPORT fastsparse::edge::Knobs* fastsparse_cpu_knobs() { return &fastsparse::edge::knobs; }
