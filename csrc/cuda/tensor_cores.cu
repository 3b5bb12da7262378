#include "cuda/tensor_cores.h"

#include "cuda/edge.h"
#include "cuda/knobs.h"

namespace fastsparse::cuda {

namespace {

#ifdef FASTSPARSE_EMULATED
int capability() { return 0; }
#else
int capability() {
  int device = 0, major = 0;
  check(cudaGetDevice(&device), "asking for the current device");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "asking for its compute capability");
  return major;
}
#endif

}  // namespace

// In quarters of D 2^-24 |x||w|. Tensor cores add L products to a sum at once: these L + 1 are cut to F bits behind the
// leading one of the largest among them, the new sum to fp32. None of them exceeds |x||w|, nor does a partial sum, by
// Cauchy and Schwarz. So L products are off by at most ((L + 1) 2^-F + 2^-23) |x||w|, and D of them by
//   L = 16, F = 25 (9.x, 10.x, 12.x):  0.66 D 2^-24; with L = 8, as their older instructions have it, 0.81 D 2^-24
//   L = 8,  F = 24 (8.x):              1.38 D 2^-24
//   L = 8,  F = 23 (at the least):     2.50 D 2^-24
// (L, F: github.com/microsoft/MMA-Sim, and Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores").
// A last step that is not full takes 3 2^-24 more, errors raise what they are relative to by D 2^-24 at most. The other
// 5 are for the few partial sums that a library adds, for bias and scale.
extern "C" __attribute__((visibility("default"))) int fastsparse_cuda_accumulation(int major) {
  return major == 9 || major == 10 || major == 12 ? 4 : major == 8 ? 7 : 12;
}

float accumulation_error(int64_t terms) {
  int64_t quarters = knobs.accumulation < 0 ? fastsparse_cuda_accumulation(capability()) : knobs.accumulation;
  return float(quarters * terms + 32) * 0x1p-26f;
}

}  // namespace fastsparse::cuda
