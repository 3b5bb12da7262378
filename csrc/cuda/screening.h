// Products of fp32 in bf16, on tensor cores.
#pragma once

namespace fastsparse::cuda {

// Where ops take scores by them that they then refine: where it pays (-1), or for tests never (0) or wherever it is
// possible (1). fastsparse_cuda_set_screening sets it.
int screening_choice();

}  // namespace fastsparse::cuda
