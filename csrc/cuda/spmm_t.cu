#include "cuda/spmm_t.cuh"

#include <algorithm>
#include <bit>

#include "cuda/edge.h"
#include "cuda/rows.h"
#include "cuda/sort.h"

namespace fastsparse::cuda {

namespace {

// How long the pieces of hot latents are: 256 entries at least (32 waits for memory one after another, some 20 us), and
// more where there would be over 8192 of them: so the partial sums take no more than 2 * 8192 rows, 64 kB * D.
int split_bits(int64_t nnz) {
  int bits = 8;
  while (nnz >> bits > 8192) ++bits;
  return bits;
}

// Temporary memory: 16 bytes an entry to sort, or 32 where indices need 64 bits, and 16 for its term; 16 bytes a
// latent; the partial sums. Sizes come from shapes alone, and no step waits for the device.
template <typename T, typename Word>
void run(const Call& call, const Tensor& values, const Tensor& indices, const Tensor& x, const Tensor& out,
         ScalarType word) {
  using C = Accumulator<T>;
  int64_t nnz = indices.numel(), k = indices.size(1), M = out.size(0), D = out.size(1);
  int split = split_bits(nnz);
  int64_t marks = nnz >> split;
  auto blocks = [](int64_t threads) { return unsigned((threads + kGatherBlock - 1) / kGatherBlock); };

  Tensor ranges = allocate(x, {M, 2}, ScalarType::Long), marked = allocate(x, {marks}, ScalarType::Long);
  Tensor terms = allocate(x, {nnz, 16}, ScalarType::Byte);
  Tensor partials = allocate(x, {2 * marks, D}, accumulator_of(x.scalar_type()));
  auto* entries = static_cast<Entries*>(ranges.mutable_data_ptr());
  auto* term = static_cast<Term<C>*>(terms.mutable_data_ptr());
  static_assert(sizeof(Term<C>) == 16 && sizeof(Entries) == 16);
  {
    Pairs pairs{allocate(x, {nnz}, word), allocate(x, {nnz}, word)};
    call.launch("spmm_t_pairs", spmm_t_pairs<Word>, blocks(std::max(nnz, M)), kGatherBlock, 0, data<int64_t>(indices),
                mutable_data<Word>(pairs.keys), mutable_data<Word>(pairs.values), entries, nnz, k, M, indices.stride(0),
                indices.stride(1));
    pairs = sort_pairs(call, pairs, std::bit_width(uint64_t(M - 1)));
    call.launch("spmm_t_terms", spmm_t_terms<T, Word>, blocks(nnz), kGatherBlock, 0, data<Word>(pairs.keys),
                data<Word>(pairs.values), data<T>(values), term, entries, mutable_data<int64_t>(marked), nnz, k, M,
                split, values.stride(0), values.stride(1), x.stride(0));
  }

  auto gather = [&]<int Width>() {
    Panels panels = Panels::of(D, Width, most_lane_bits(nnz, x.size(0), D * sizeof(T), Width * sizeof(T)));
    unsigned per_panel = panels.blocks(marks + M, kGatherBlock);
    call.launch("spmm_t_gather", spmm_t_gather<T, Width>, unsigned(panels.count) * per_panel, kGatherBlock, 0, term,
                entries, data<int64_t>(marked), data<T>(x), mutable_data<T>(out), mutable_data<C>(partials), M, D,
                marks, per_panel, panels.lane_bits, split);
  };
  if (D == 1)
    call.launch("spmm_t_column", spmm_t_column<T>, blocks((marks + M) << kLeastLaneBits), kGatherBlock, 0, term,
                entries, data<int64_t>(marked), data<T>(x), mutable_data<T>(out), mutable_data<C>(partials), M, marks,
                split);
  else if (takes_packets<T>(x, D)) gather.template operator()<Packet<T>::size>();
  else gather.template operator()<1>();
  unsigned panels = blocks((D + kJoined - 1) / kJoined);
  call.launch("spmm_t_join", spmm_t_join<T>, unsigned(marks) * panels, kGatherBlock, 0, data<C>(partials), entries,
              data<int64_t>(marked), mutable_data<T>(out), D, marks, panels, split);
}

}  // namespace

Tensor spmm_t(const Tensor& values, const Tensor& indices, const Tensor& x, int64_t M) {
  Call call(x);
  check_indices(call, "spmm_t", indices, M);
  Tensor rows = with_unit_stride(x), out = allocate(x, {M, x.size(1)}, x.scalar_type());
  if (out.numel() == 0) return out;
  bool short_words = std::max(indices.numel(), M) <= int64_t{1} << 32;
  with_type(dtype_of(x), [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (short_words) run<T, uint32_t>(call, values, indices, rows, out, ScalarType::Int);
    else run<T, uint64_t>(call, values, indices, rows, out, ScalarType::Long);
  });
  return out;
}

FASTSPARSE_REGISTER(fastsparse_cuda, FASTSPARSE_DEVICE_KEY, spmm_t)

}  // namespace fastsparse::cuda
