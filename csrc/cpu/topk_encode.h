// The k largest of x @ weight.T + bias per row: screen, certify, refine.
//
// `filter` streams exact scores through a per-row buffer that holds the best so far; `screen` (screen.h) does so with
// bf16 scores in brackets, and what survives is scored exactly by `refine`. `select` puts a row's candidates in order.
#pragma once

#include "options.h"
#include "cpu/screen.h"

namespace fastsparse {

struct SelectArgs {
  const int64_t* eligible;  // null for all
  const int64_t* order;     // output row of each row; null for 0, 1, 2, ...
  Activation activation;
  void* values;             // of dtype, k in a row
  int64_t* indices;
  int64_t stride;           // between rows of both
  int64_t first;            // the first of the latents, where they are a group of more
  DType dtype;
};

FASTSPARSE_DECLARE_KERNEL(void topk_encode_filter(const Candidates& candidates, const Stripe& stripe, int64_t row_begin,
                                                  int64_t row_end))
// Exact scores of a screen's candidates whose latent lies in [latent_begin, latent_end), in place of their bounds. To
// be called when all rows have been certified.
FASTSPARSE_DECLARE_KERNEL(void topk_encode_refine(const Candidates& candidates, const RefineArgs& args,
                                                  int64_t latent_begin, int64_t latent_end))
FASTSPARSE_DECLARE_KERNEL(void topk_encode_select(const Candidates& candidates, const SelectArgs& args,
                                                  int64_t row_begin, int64_t row_end))

}  // namespace fastsparse
