// Products on tensor cores: device code.
#pragma once

#include "cuda/device.cuh"

namespace fastsparse::cuda {

#ifndef FASTSPARSE_EMULATED

// c += a b of 16 x 16 and 16 x 8 bf16, by a warp: mma.m16n8k16, of which the PTX ISA says what a lane holds. With row =
// lane / 4 and pair = lane % 4, two neighbours a word: a is pairs `pair` and `pair` + 4 of rows `row` and `row` + 8, in
// the order (row, pair), (row + 8, pair), (row, pair + 4), (row + 8, pair + 4); b the same pairs of its column `row`; c
// columns 2 pair and 2 pair + 1 of `row`, then of `row` + 8.
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

// Two neighbours in a row, each in two parts of bf16, high and low, which leave at most 2^-18 of it.
struct Parts {
  uint32_t high, low;
  float whole[2], left[2];  // `left` by the high part

  __device__ __forceinline__ explicit Parts(const float (&two)[2]) : whole{two[0], two[1]} {
    bf16 highs[2] = {narrow<bf16>(two[0]), narrow<bf16>(two[1])};
    left[0] = two[0] - widen(highs[0]);
    left[1] = two[1] - widen(highs[1]);
    high = pair(highs[0], highs[1]);
    low = pair(narrow<bf16>(left[0]), narrow<bf16>(left[1]));
  }
  __device__ __forceinline__ void add_squares(float& of_whole, float& of_left) const {
    of_whole += whole[0] * whole[0] + whole[1] * whole[1];
    of_left += left[0] * left[0] + left[1] * left[1];
  }
  static __device__ __forceinline__ uint32_t pair(bf16 first, bf16 second) {
    return uint32_t(second.bits) << 16 | first.bits;
  }
};

}  // namespace fastsparse::cuda
