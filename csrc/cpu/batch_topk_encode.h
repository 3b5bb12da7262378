// The `total` largest of x @ weight.T + bias among all rows: one pool for the whole batch, in place of a row's list.
//
// Scores pass through a short list of each row (screen.h) to the pool. When that is full, all but what can win goes:
// the `total`-th largest of any scores is a lower bound on that of all, and the next scores must reach it. What is kept
// in the end depends on the scores alone, since their order is total, and not on who comes first.
#pragma once

#include <pthread.h>

#include "options.h"
#include "cpu/screen.h"

namespace fastsparse {

struct Pool {
  int64_t total, capacity;  // more than `total`
  DType dtype;              // the accumulation type
  void* entries;            // (capacity, pool_entry_bytes): key and score, row and eligible position; before a screen's
                            // survivors are scored the key's upper and lower bound
  bool bracketed;           // they are bounds
  float* lower;             // of bounds: (capacity + kSlack), scratch
  int64_t count = 0;
  bool bounded = false;     // there is a bound, and where it is a key its row
  double bound = 0;
  int64_t bound_row = 0;
  bool hopeless = false;    // the screen can't decide: it has more than `capacity` that may be among the largest
  // The rows at hand: from one on, or those listed.
  int64_t first_row = 0;
  const int64_t* order = nullptr;
  // Not std::mutex: its inline functions would be compiled for every instruction-set level, and the linker keeps one.
  pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
};
constexpr int64_t pool_entry_bytes(int64_t number_bytes) { return 2 * number_bytes + 8; }

struct ArrangeArgs {
  int64_t N;
  const int64_t* eligible;  // null for all
  Activation activation;
  void* values;             // (total) of dtype
  int64_t *indices, *offsets;
  void* threshold;          // of the accumulation type
  DType dtype;
  void* sorted;             // (total, pool_entry_bytes) scratch
};

// Takes what may be among the largest from a stripe of exact scores, or of bf16 ones in brackets.
FASTSPARSE_DECLARE_KERNEL(void batch_topk_encode_filter(Pool* pool, const Candidates& candidates, const Stripe& stripe,
                                                        int64_t row_begin, int64_t row_end))
FASTSPARSE_DECLARE_KERNEL(void batch_topk_encode_screen(Pool* pool, const Candidates& candidates, const Stripe& stripe,
                                                        int64_t row_begin, int64_t row_end))
// Drops what can't win, if there is more than `total`.
FASTSPARSE_DECLARE_KERNEL(void batch_topk_encode_compact(Pool* pool))
// As topk_encode_refine; the pool's entries are scores from then on.
FASTSPARSE_DECLARE_KERNEL(void batch_topk_encode_refine(Pool* pool, const RefineArgs& args, bool absolute,
                                                        int64_t latent_begin, int64_t latent_end))
// The largest, by their rows: offsets and threshold; then values and indices of some rows.
FASTSPARSE_DECLARE_KERNEL(void batch_topk_encode_arrange(Pool* pool, const ArrangeArgs& args))
FASTSPARSE_DECLARE_KERNEL(void batch_topk_encode_write(const ArrangeArgs& args, int64_t row_begin, int64_t row_end))

}  // namespace fastsparse
