// The instruction-set level, for Python (through ctypes).
#include "cpu/isa.h"

#define FASTSPARSE_EXPORT extern "C" __attribute__((visibility("default")))

FASTSPARSE_EXPORT int fastsparse_cpu_level() { return int(fastsparse::current_isa()); }
FASTSPARSE_EXPORT int fastsparse_cpu_best_level() { return int(fastsparse::best_isa()); }
FASTSPARSE_EXPORT void fastsparse_cpu_set_level(int level) { fastsparse::set_isa(fastsparse::Isa(level)); }
