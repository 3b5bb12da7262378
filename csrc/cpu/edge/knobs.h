// What tests turn and read, by name in tests/knobs.py.
#pragma once

#include <cstdint>

namespace fastsparse::edge {

struct Knobs {
  int64_t screening = -1;  // bf16 products first: where that pays (-1), never (0) or wherever it is possible (1)
  int64_t kept_atoms = 0;  // how many atoms there are to the Gram matrix that is kept
};
extern Knobs knobs;

}  // namespace fastsparse::edge
