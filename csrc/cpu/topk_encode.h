// The k largest of x @ weight.T + bias per row: screen, certify, refine.
//
// `filter` streams exact scores through a per-row buffer that holds the best so far; `screen` (screen.h) does so with
// bf16 scores in brackets, and what survives is scored exactly by `refine`. `select` puts a row's candidates in order.
#pragma once

#include "options.h"
#include "cpu/rows.h"
#include "cpu/screen.h"

namespace fastsparse {

struct RefineArgs {
  int64_t N;
  Rows x, weight;      // the weight's of the eligible latents
  const float* bias;   // by eligible position
  const float* scale;  // or null
};

struct SelectArgs {
  const int64_t* eligible;  // null for all
  const int64_t* order;     // output row of each row; null for 0, 1, 2, ...
  Activation activation;
  void* values;             // (N, k) of dtype
  int64_t* indices;
  DType dtype;
};

FASTSPARSE_DECLARE_KERNEL(void topk_encode_filter(const Candidates& candidates, const Stripe& stripe, int64_t row_begin,
                                                  int64_t row_end))
// Exact scores of a screen's candidates whose latent lies in [latent_begin, latent_end), in place of their bounds;
// latent-major, so that a row of the weight is read once for all the tokens that want it. To be called when all rows have
// been certified.
FASTSPARSE_DECLARE_KERNEL(void topk_encode_refine(const Candidates& candidates, const RefineArgs& args,
                                                  int64_t latent_begin, int64_t latent_end))
FASTSPARSE_DECLARE_KERNEL(void topk_encode_select(const Candidates& candidates, const SelectArgs& args,
                                                  int64_t row_begin, int64_t row_end))

}  // namespace fastsparse
