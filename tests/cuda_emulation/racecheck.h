// What the scheduler tells the race detector (racecheck.cpp) of; nothing in builds without it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace fastsparse::emulator::racecheck {

#ifdef FASTSPARSE_RACECHECK
void begin_launch();
void begin_block(unsigned block);
void end_launch();
void all_threads_met();                             // at a barrier
void lanes_met(unsigned warp, unsigned mask);       // at __syncwarp
void thread_runs(int thread);                       // -1: none, the host's code
void allot_shared(const void* address, size_t bytes);
void atomic_access(const volatile void* address, size_t bytes, const void* pc);
#else
inline void begin_launch() {}
inline void begin_block(unsigned) {}
inline void end_launch() {}
inline void all_threads_met() {}
inline void lanes_met(unsigned, unsigned) {}
inline void thread_runs(int) {}
inline void allot_shared(const void*, size_t) {}
inline void atomic_access(const volatile void*, size_t, const void*) {}
#endif

}  // namespace fastsparse::emulator::racecheck
