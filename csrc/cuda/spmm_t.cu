#include "cuda/spmm_t.cuh"

#include <algorithm>
#include <bit>

#include "cuda/edge.h"
#include "cuda/lists.h"
#include "cuda/rows.h"
#include "cuda/sort.h"

namespace fastsparse::cuda {

namespace {

// Temporary memory: 16 bytes an entry to sort, or 32 where indices need 64 bits, and what lists take. Sizes come from
// shapes alone.
template <typename T, typename Word>
void run(const Call& call, const Tensor& values, const Tensor& indices, const Tensor& x, const Tensor& out,
         const std::optional<Tensor>& offsets, ScalarType word) {
  int64_t nnz = x.size(0) ? indices.numel() : 0, M = out.size(0);
  int64_t k = offsets ? 1 : indices.size(1), index_column = offsets ? 0 : indices.stride(1);
  int64_t value_column = offsets ? 0 : values.stride(1);
  Tokens tokens{offsets ? data<int64_t>(*offsets) : nullptr, x.size(0)};
  ListMemory latents(x, M, nnz);
  RowLists<Accumulator<T>> lists = latents.of<Accumulator<T>>();
  {
    Pairs pairs{allocate(x, {nnz}, word), allocate(x, {nnz}, word)};
    call.launch("spmm_t_pairs", spmm_t_pairs<Word>, gather_blocks(std::max(nnz, M)), kGatherBlock, 0,
                data<int64_t>(indices), tokens, mutable_data<Word>(pairs.keys), mutable_data<Word>(pairs.values),
                lists.ranges, nnz, k, M, indices.stride(0), index_column);
    pairs = sort_pairs(call, pairs, std::bit_width(uint64_t(M - 1)));
    call.launch("spmm_t_terms", spmm_t_terms<T, Word>, gather_blocks(nnz), kGatherBlock, 0, data<Word>(pairs.keys),
                data<Word>(pairs.values), data<T>(values), tokens, lists, nnz, k, values.stride(0), value_column,
                x.stride(0));
  }
  sum_lists(call, latents, x, out);
}

}  // namespace

Tensor spmm_t(const Tensor& values, const Tensor& indices, const Tensor& x, int64_t M,
              const std::optional<Tensor>& offsets) {
  Call call(x);
  check_indices(call, "spmm_t", indices, M, offsets);
  Tensor rows = with_unit_stride(x), out = allocate(x, {M, x.size(1)}, x.scalar_type());
  if (out.numel() == 0) return out;
  std::optional<Tensor> bounds;
  if (offsets) bounds = as_contiguous(*offsets, ScalarType::Long);
  bool short_words = std::max(indices.numel(), M) <= int64_t{1} << 32;
  with_type(dtype_of(x), [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (short_words) run<T, uint32_t>(call, values, indices, rows, out, bounds, ScalarType::Int);
    else run<T, uint64_t>(call, values, indices, rows, out, bounds, ScalarType::Long);
  });
  return out;
}

FASTSPARSE_REGISTER(fastsparse_cuda, FASTSPARSE_DEVICE_KEY, spmm_t)

}  // namespace fastsparse::cuda
