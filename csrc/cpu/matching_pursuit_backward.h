// The gradient of matching pursuit, back through its steps (derived in fastsparse/reference/matching_pursuit.py).
//
// A step hands g = dL/dr' on as g + q w, with q from the product of g and the step's atom w. `rows` finds every q, and
// with the last g the gradient of x. Once the q are known no column needs another: `columns` goes back through all
// steps a second time for a panel of columns, whose r and g stay in registers, and sums up the dictionary's gradient
// there. A sum's terms come in the order of the rows and, of a row, of its steps backwards, whoever has the panel.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "cpu/isa.h"

namespace fastsparse {

// A step with its coefficient c, of the accumulation type C. Where c is 0 it was none.
template <typename C> struct PursuitStep {
  int64_t atom;
  C c, q;
};

struct PursuitBackwardArgs {
  const int64_t* indices;  // (N, k), checked
  const void* values;      // (N, k) of the accumulation type
  const void* d_values;    // (N, k) of the accumulation type
  const void* residual;    // (N) rows residual_stride apart, what was left after the last step
  const void* d_residual;  // (N) rows d_residual_stride apart, or null
  const void* dictionary;  // (M) atoms atom_stride apart
  void* steps;             // (N, k) steps, those of a row backwards
  void* g;                 // (N, D) of the accumulation type: the gradient of x
  void* d_dictionary;      // (M, D) of dtype
  int64_t N, D, M, k, residual_stride, d_residual_stride, atom_stride;
  bool normalized;
  DType dtype;
};

// A panel is 1 or 4 SIMD vectors wide, of so many bytes.
FASTSPARSE_DECLARE_KERNEL(int64_t matching_pursuit_backward_vector_bytes())
FASTSPARSE_DECLARE_KERNEL(void matching_pursuit_backward_rows(const PursuitBackwardArgs& args, int64_t row_begin,
                                                              int64_t row_end))
// Columns from `begin` on; `sums` is scratch for (M, panel width) of the accumulation type.
FASTSPARSE_DECLARE_KERNEL(void matching_pursuit_backward_columns(const PursuitBackwardArgs& args, int64_t begin,
                                                                 int64_t vectors, void* sums))

}  // namespace fastsparse
