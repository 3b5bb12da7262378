// The mode of the floating-point unit, of which every thread has its own: how it rounds, what it traps, and whether it
// takes subnormal numbers for zeros, as torch.set_flush_denormal(True) has it.
//
// An op computes in one mode, whatever its caller's, and `parallel` takes that to the other threads: to nearest, without
// traps. The library's products in threads of the library's own are as those threads were made; the bounds on these
// products hold in any mode.
#pragma once

#include <cstdint>

namespace fastsparse::edge {

enum class Subnormals {
  kept,      // by searches, which bisect numbers by their bits and must tell neighbours apart
  as_asked,  // by sums: zeros where the caller has asked for that, since arithmetic with them is slow
};

// The control bits of the calling thread.
uint64_t float_mode();

// The calling thread in another mode, until this goes.
class InFloatMode {
 public:
  explicit InFloatMode(uint64_t mode);
  explicit InFloatMode(Subnormals subnormals);
  ~InFloatMode();
  InFloatMode(const InFloatMode&) = delete;

 private:
  uint64_t before_, mode_;
};

}  // namespace fastsparse::edge
