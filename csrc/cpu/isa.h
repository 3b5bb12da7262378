// Instruction-set levels: which exist, which this CPU has, which one runs.
#pragma once

namespace fastsparse {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

// What the CPU, and the registers that the operating system saves, can run.
struct CpuFeatures {
  bool avx2 = false;       // x86-64-v3: with FMA, BMI2, F16C
  bool avx512 = false;     // x86-64-v4: F, BW, CD, DQ, VL
  bool fast_bf16 = false;  // AVX512-BF16, AMX-BF16 or Arm's FEAT_BF16: bf16 matrix products outrun fp32 ones
  bool bf16_dots = false;  // AVX512-BF16
  bool vnni = false;       // AVX512-VNNI: products of integers are added up where they are made, in 512 bits
  bool avx_vnni = false;   // the same in 256 bits
  bool zen5 = false;       // AMD's Zen 5 or later
  bool amd = false;
};

const CpuFeatures& cpu_features();
Isa best_isa();
Isa current_isa();
void set_isa(Isa isa);

}  // namespace fastsparse

// A kernel file is compiled once for each level, in a namespace of the level's name. Whatever it instantiates from
// the standard library must carry a type of that namespace, or the linker could hand AVX-512 code to an older CPU.
#if defined(__x86_64__)
#define FASTSPARSE_DECLARE_KERNEL(signature) \
  namespace baseline { signature; }          \
  namespace avx2 { signature; }              \
  namespace avx512 { signature; }
#define FASTSPARSE_KERNEL(name)                                          \
  (::fastsparse::current_isa() == ::fastsparse::Isa::avx512 ? ::fastsparse::avx512::name \
   : ::fastsparse::current_isa() == ::fastsparse::Isa::avx2 ? ::fastsparse::avx2::name   \
                                                            : ::fastsparse::baseline::name)
#else
#define FASTSPARSE_DECLARE_KERNEL(signature) \
  namespace baseline { signature; }
#define FASTSPARSE_KERNEL(name) (::fastsparse::baseline::name)
#endif
