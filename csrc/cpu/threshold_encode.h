// Every score of x @ weight.T + bias that isn't at most its latent's bound, stripe by stripe of latents, row by row.
//
// A stripe's scores are counted before they are listed: lists are as long as what they hold. Of bf16 scores, in
// brackets (bracket.h), those are listed that may be above their bounds; `refine` scores them exactly, and `keep`
// compares again.
#pragma once

#include "cpu/screen.h"

namespace fastsparse {

struct Bounds {
  const void* values;  // (count) of the stripe's latents and of the accumulation type, read as the stripe's vectors are
  bool absolute;       // |score| is compared
  DType dtype;         // the accumulation type
};

// What of a stripe's scores is listed.
struct Listed {
  int64_t* offsets;  // (N + 1) where each row's entries begin
  int64_t* counts;   // (N) how many they are
  int32_t* latents;  // positions in the stripe, ascending in a row
  void* scores;      // of the accumulation type
};

// How many of each row are to be listed.
FASTSPARSE_DECLARE_KERNEL(void threshold_encode_count(const Stripe& stripe, const Bounds& bounds, const Listed& listed,
                                                      int64_t row_begin, int64_t row_end))
// Lists them, the offsets being known; of a screen with bounds in the place of scores.
FASTSPARSE_DECLARE_KERNEL(void threshold_encode_list(const Stripe& stripe, const Bounds& bounds, const Listed& listed,
                                                     int64_t row_begin, int64_t row_end))
// Exact scores of what a screen lists of latents [latent_begin, latent_end) of the stripe.
FASTSPARSE_DECLARE_KERNEL(void threshold_encode_refine(const Listed& listed, const RefineArgs& args,
                                                       int64_t latent_begin, int64_t latent_end))
// Drops what is at most its bound after all: rows are shorter then, and begin where they did.
FASTSPARSE_DECLARE_KERNEL(void threshold_encode_keep(const Bounds& bounds, const Listed& listed, int64_t row_begin,
                                                     int64_t row_end))

}  // namespace fastsparse
