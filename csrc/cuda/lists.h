// Sums of listed rows, which spmm and spmm_t share.
#pragma once

#include "cuda/edge.h"
#include "cuda/lists.cuh"
#include "cuda/rows.h"

namespace fastsparse::cuda {

// Memory for `count` lists that have so many terms together: what a caller's kernel fills. 16 bytes a term and a list.
class ListMemory {
 public:
  ListMemory(const Tensor& like, int64_t count, int64_t terms);
  int64_t terms() const { return terms_.size(0); }

  template <typename C> RowLists<C> of() const {
    static_assert(sizeof(Term<C>) == 16 && sizeof(Range) == 16);
    return {static_cast<Term<C>*>(terms_.mutable_data_ptr()), static_cast<Range*>(ranges_.mutable_data_ptr()),
            mutable_data<int64_t>(marked_), ranges_.size(0), marked_.size(0), split_bits_};
  }

 private:
  int split_bits_;
  Tensor terms_, ranges_, marked_;
};

// The lists' sums, of rows with unit stride, whose places the terms name, to out (count, D). Takes two rows of
// accumulators for every 2^split_bits terms. No step waits for the device.
void sum_lists(const Call& call, const ListMemory& memory, const Tensor& rows, const Tensor& out);

}  // namespace fastsparse::cuda
