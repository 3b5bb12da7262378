// out[i] = sum of coefficients[e] * matrix[rows[e]] over offsets[i] <= e < offsets[i + 1], in this order: what spmm
// does with a ragged code, and spmm_t with one in latent-major order.
//
// Lists differ wildly in length, so the work is cut by entries: a place is a list's head, or an entry behind it, and a
// task is a range of places. A list of more than kSegment entries is hot: it is cut into segments, which run in
// parallel into scratch rows and are added up in order. Where the cuts lie depends on the list alone: the result is the
// same for any number of threads.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "cpu/fetch.h"
#include "cpu/isa.h"

namespace fastsparse {

inline constexpr int64_t kSegment = 1024;

struct ListsArgs {
  const void* coefficients;  // (E) of the accumulation type
  const int64_t* rows;       // (E), checked
  const int64_t* offsets;    // (count + 1), checked
  const void* matrix;        // rows of D, row_stride apart
  void* out;                 // (count, D)
  int64_t count, D, row_stride;
  DType dtype;               // of matrix and out
  Fetch fetch;               // by whether the rows that are used fit into the cache together
};

struct Hot {
  int64_t list, begin, end;  // and its segments
};

// Lists with at most one segment whose heads lie in [begin, end) of count + E places, straight into out.
FASTSPARSE_DECLARE_KERNEL(void sum_lists(const ListsArgs& args, Range columns, int64_t begin, int64_t end))
// Segments of hot lists, each into its row of partial sums, (segments, D) of the accumulation type.
FASTSPARSE_DECLARE_KERNEL(void sum_segments(const ListsArgs& args, Range columns, const Range* segments, void* partials,
                                            int64_t begin, int64_t end))
// The sums of hot lists' partial sums.
FASTSPARSE_DECLARE_KERNEL(void join_segments(const ListsArgs& args, const Hot* hot, const void* partials, int64_t begin,
                                             int64_t end))

}  // namespace fastsparse
