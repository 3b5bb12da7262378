// Norms of a matrix's rows.
#pragma once

#include "cuda/edge.h"

namespace fastsparse::cuda {

// (M,) squared norms, in fp64, of the rows of a matrix (M, D) with unit stride.
Tensor squared_norms(const Call& call, const Tensor& rows);

}  // namespace fastsparse::cuda
