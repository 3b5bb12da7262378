// Instruction-set levels: which exist, which this CPU has, which one runs.
#pragma once

namespace fastsparse {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

// What the CPU (and the operating system's saved state) can run.
struct CpuFeatures {
  bool avx2 = false;      // with fma and f16c: x86-64-v3
  bool avx512 = false;    // f, bw, cd, dq, vl: x86-64-v4
  bool fast_bf16 = false; // avx512_bf16 or amx_bf16: the bf16 matrix product outruns the fp32 one
};

const CpuFeatures& cpu_features();
Isa best_isa();
Isa current_isa();
void set_isa(Isa isa);

}  // namespace fastsparse

