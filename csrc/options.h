// What ops are told by name: here, as in a schema, by the position in fastsparse/_options.py.
#pragma once

#include <cstdint>

namespace fastsparse {

enum class Activation : int { relu, none, abs };
inline constexpr int64_t kActivations = 3;

enum class Method : int { automatic, direct, gram };  // of matching pursuit
inline constexpr int64_t kMethods = 3;

enum class Solver : int { automatic, sequential, newton, shooting };  // of gated recurrences
inline constexpr int64_t kSolvers = 4;

}  // namespace fastsparse
