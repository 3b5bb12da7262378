// How exact a GPU's tensor cores are.
#pragma once

#include <cstdint>

namespace fastsparse::cuda {

// How far sums of so many products of bf16 (or fp16) may be off on the current device's tensor cores, with a bias added
// and a scale multiplied: a multiple of |x||w|.
float accumulation_error(int64_t terms);

}  // namespace fastsparse::cuda
