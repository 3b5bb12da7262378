// What the machine tells the race detector (racecheck.cpp) of; nothing in variants without it.
#pragma once

#include <cstddef>

#include "emulator.h"

namespace fastsparse::emulator::racecheck {

#ifdef FASTSPARSE_RACECHECK
void ignore(const void* memory, size_t bytes);  // the threads' own stacks
void begin_launch(const void* shared_arena, size_t bytes);
void allot_shared(const char* memory, size_t bytes);
void begin_block(uint3 index, unsigned threads);
void thread_runs(int number);  // in the block; -1: the host's code runs
void all_threads_met();        // at a barrier
void lanes_met(unsigned warp, unsigned mask);  // at __syncwarp
void atomic_access(const volatile void* address, size_t bytes, const void* pc);
#else
inline void ignore(const void*, size_t) {}
inline void begin_launch(const void*, size_t) {}
inline void allot_shared(const char*, size_t) {}
inline void begin_block(uint3, unsigned) {}
inline void thread_runs(int) {}
inline void all_threads_met() {}
inline void lanes_met(unsigned, unsigned) {}
inline void atomic_access(const volatile void*, size_t, const void*) {}
#endif

}  // namespace fastsparse::emulator::racecheck
