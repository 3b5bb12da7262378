// The library's matrix product.
#pragma once

#include "cpu/edge/edge.h"

namespace fastsparse::edge {

// a (N, D) @ b (S, D).T -> (N, S), contiguous, of their type; in `out` or in a tensor of the library's own.
Tensor product(const Tensor& a, const Tensor& b, const Tensor& out);

// Whether fp32 products go to oneDNN, since PyTorch's own choice is slower on this processor. Python asks, too.
bool prefers_onednn();

// Whether products of this type are of its precision: torch.set_float32_matmul_precision may have lowered fp32's.
bool in_full_precision(ScalarType type);

}  // namespace fastsparse::edge
