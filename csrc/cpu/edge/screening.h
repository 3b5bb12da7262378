// What every op that screens by bf16 products needs.
#pragma once

#include "cpu/edge/edge.h"
#include "cpu/topk_encode.h"

namespace fastsparse::edge {

// Whether bf16 products decide first which latents are scored exactly: where that pays, or as tests will have it.
bool screens(DType dtype, int64_t N, int64_t D, int64_t latents, int64_t k);

// A stripe with its terms of the error bracket (derived in topk_encode.cpp), scaled as the keys are. Of its `count`
// atoms, `norm` and `residual` come as topk_encode_round leaves them and are kept by the stripe, as is `rest`.
Stripe bracketed(Stripe stripe, float* norm, float* residual, float* rest, int64_t D);

}  // namespace fastsparse::edge
