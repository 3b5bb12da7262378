#include "cpu/edge/float_mode.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fastsparse::edge {

namespace {

#if defined(__x86_64__)
// MXCSR (Intel SDM 1, 10.2.3): below are flags of what has happened; 6 and 15 zero subnormal operands and results.
constexpr uint64_t kControl = 0xffc0, kFlushing = 0x8040, kDefault = 0x1f80;
uint64_t read() { return _mm_getcsr(); }
void write(uint64_t bits) { _mm_setcsr(unsigned(bits)); }
#elif defined(__aarch64__)
// FPCR (Arm ARM, C5.2.8): all of it is control; 24 zeroes subnormal operands and results, 19 those of fp16.
constexpr uint64_t kControl = ~uint64_t{0}, kFlushing = 0x1080000, kDefault = 0;
uint64_t read() {
  uint64_t bits;
  asm volatile("mrs %0, fpcr" : "=r"(bits));
  return bits;
}
void write(uint64_t bits) { asm volatile("msr fpcr, %0" ::"r"(bits) : "memory"); }
#else
constexpr uint64_t kControl = 0, kFlushing = 0, kDefault = 0;
uint64_t read() { return 0; }
void write(uint64_t) {}
#endif

}  // namespace

uint64_t float_mode() { return read() & kControl; }

InFloatMode::InFloatMode(uint64_t mode) : before_(read()), mode_(mode) {
  if (mode != (before_ & kControl)) write((before_ & ~kControl) | mode);
}
InFloatMode::InFloatMode(Subnormals subnormals)
    : InFloatMode(kDefault | (subnormals == Subnormals::as_asked ? read() & kFlushing : 0)) {}
InFloatMode::~InFloatMode() {
  if (mode_ != (before_ & kControl)) write(before_);
}

}  // namespace fastsparse::edge
