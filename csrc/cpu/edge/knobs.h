// What tests turn and read, by name in tests/knobs.py.
#pragma once

#include <cstdint>

namespace fastsparse::edge {

struct Knobs {
  int64_t screening = -1;   // a screen: where that pays (-1), never (0), wherever it is possible by bf16 (1) or integers (2)
  int64_t fused = 1;        // whether integers are multiplied and added up in one instruction, where the processor has it
  int64_t strassen = -1;    // whether integers are multiplied by Strassen's product: where that pays (-1)
  int64_t kept_atoms = 0;   // how many atoms there are to the Gram matrix that is kept
  int64_t free_bytes = -1;  // how much memory could be had: as the system says (-1)
};
extern Knobs knobs;

}  // namespace fastsparse::edge
