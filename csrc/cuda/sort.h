// The library's sort.
#pragma once

#include "cuda/edge.h"

namespace fastsparse::cuda {

// Keys and what goes with each: two 1-D contiguous tensors of one length. Keys are unsigned numbers kept in int32 or
// int64, values int32 or int64, both of the same width.
struct Pairs {
  Tensor keys, values;
};

// Sorts pairs by the lowest `bits` bits of their keys, ascending; pairs of equal keys keep their order. The pairs given
// become scratch memory: theirs may be the result's. Takes as much memory again, and CUB's few hundred kB.
Pairs sort_pairs(const Call& call, const Pairs& pairs, int bits);

}  // namespace fastsparse::cuda
