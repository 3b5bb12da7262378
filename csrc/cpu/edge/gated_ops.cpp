#include <tuple>

#include "gated.h"
#include "registration.h"

#define FASTSPARSE_GATED_OP(op) FASTSPARSE_REGISTER(fastsparse, CPU, op)

namespace fastsparse::edge {

#include "gated_ops.h"

}  // namespace fastsparse::edge
