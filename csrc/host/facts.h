// What was built, and what this CPU can do, as JSON: in a wheel, without a Python of its own, and in _host alike.
#pragma once

namespace fastsparse {

// Compiler, instruction-set levels and sanitizers; of CUDA the toolkit's version and the code compiled, or null.
const char* build_facts();

// The CPU's features that kernels choose by, and the best level that it can run.
const char* cpu_facts();

}  // namespace fastsparse
