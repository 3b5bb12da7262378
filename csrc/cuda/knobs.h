// What tests and benchmarks turn, by name in tests/knobs.py: so little work shows what otherwise takes much.
#pragma once

#include <cstdint>

namespace fastsparse::cuda {

struct Knobs {
  // fp32 products in bf16 on tensor cores, where ops refine the scores: where it pays (-1), never (0) or wherever it is
  // possible (1), of topk_encode such as leave all to its second screen (2).
  int64_t screening = -1;
  // Of what an op takes at a time, at most so many rows, and bytes of scores or of gradients; 0: whatever is best.
  int64_t rows = 0, bytes = 0;
  // Of a block that pursues a row: its threads, and how much shared memory it may have; 0: likewise.
  int64_t threads = 0, shared_bytes = 0;
  // How far tensor cores' sums of D products are taken to be off, in quarters of D 2^-24; -1: as the device's are.
  int64_t accumulation = -1;
  // Where on the device topk_encode's screen leaves, as int32, how much each list holds, -1: it is given up; 0: nowhere.
  int64_t counts = 0;
  // Two int32 on the device, for how many rows of its last block topk_encode's screens left undecided; 0: nobody asks.
  int64_t undecided = 0;
  // Of the emulator, whether calls are to be taken for such as go into a CUDA graph.
  int64_t capturing = 0;
};
extern Knobs knobs;

}  // namespace fastsparse::cuda
