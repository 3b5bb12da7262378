#include "cuda/spmm.cuh"

#include <algorithm>

#include "cuda/edge.h"
#include "cuda/lists.h"
#include "cuda/rows.h"

namespace fastsparse::cuda {

namespace {

template <typename T, int Width>
void run(const Call& call, const Tensor& values, const Tensor& indices, const Tensor& weight, const Tensor& out,
         const Panels& panels, int threads) {
  int64_t N = indices.size(0), k = indices.size(1), D = out.size(1);
  unsigned blocks = panels.blocks(N, threads);
  call.launch("spmm_gather", spmm_gather<T, Width>, unsigned(panels.count) * blocks, threads, 0, data<T>(values),
              data<int64_t>(indices), data<T>(weight), mutable_data<T>(out), N, k, D, blocks, panels.lane_bits,
              values.stride(0), values.stride(1), indices.stride(0), indices.stride(1), weight.stride(0));
}

Tensor ragged(const Call& call, const Tensor& values, const Tensor& indices, const Tensor& atoms,
              const Tensor& offsets) {
  int64_t entries = indices.size(0), N = offsets.size(0) - 1;
  Tensor out = allocate(atoms, {N, atoms.size(1)}, atoms.scalar_type());
  if (out.numel() == 0) return out;
  ListMemory lists(atoms, N, entries);
  with_type(dtype_of(atoms), [&](auto tag) {
    using T = typename decltype(tag)::type;
    Tokens tokens{data<int64_t>(offsets), N};
    call.launch("spmm_lists", spmm_lists<T>, gather_blocks(std::max(entries, N)), kGatherBlock, 0, data<T>(values),
                data<int64_t>(indices), tokens, lists.of<Accumulator<T>>(), entries, values.stride(0),
                indices.stride(0), atoms.stride(0));
  });
  sum_lists(call, lists, atoms, out);
  return out;
}

}  // namespace

Tensor spmm(const Tensor& values, const Tensor& indices, const Tensor& weight, const std::optional<Tensor>& offsets) {
  Call call(weight);
  int64_t M = weight.size(0), D = weight.size(1);
  check_indices(call, "spmm", indices, M, offsets);
  Tensor atoms = with_unit_stride(weight);
  if (offsets) return ragged(call, values, indices, atoms, as_contiguous(*offsets, ScalarType::Long));
  int64_t N = indices.size(0), k = indices.size(1);
  Tensor out = allocate(weight, {N, D}, weight.scalar_type());
  with_type(dtype_of(weight), [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int width = Packet<T>::size;
    Panels wide = Panels::of(D, width, most_lane_bits(N * k, M, D * sizeof(T), sizeof(Packet<T>)));
    // A few tokens make too few wide tiles to keep memory busy, and each waits for it k / 8 times: then lanes take
    // single columns, with 16 rows in flight, in blocks of one warp, which spread over all multiprocessors. The sums
    // are the same to the bit: a token's result doesn't depend on how many others there are.
    bool few = (N * wide.count << wide.lane_bits) < 4 * int64_t{kWarp} * call.multiprocessors();
    if (!few && takes_packets<T>(atoms, D)) run<T, width>(call, values, indices, atoms, out, wide, kGatherBlock);
    else run<T, 1>(call, values, indices, atoms, out, Panels::of(D, 1), few ? kWarp : kGatherBlock);
  });
  return out;
}

FASTSPARSE_REGISTER(fastsparse_cuda, FASTSPARSE_DEVICE_KEY, spmm)

}  // namespace fastsparse::cuda
