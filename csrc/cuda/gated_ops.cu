#include "cuda/edge.h"
#include "gated.h"

#define FASTSPARSE_GATED_OP(op) FASTSPARSE_REGISTER(fastsparse_cuda, FASTSPARSE_DEVICE_KEY, op)

namespace fastsparse::cuda {

#include "gated_ops.h"

}  // namespace fastsparse::cuda
