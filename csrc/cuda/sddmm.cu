#include "cuda/sddmm.cuh"

#include "cuda/edge.h"
#include "cuda/rows.h"

namespace fastsparse::cuda {

namespace {

// What kernels take; a ragged code as (E, 1).
struct Operands {
  Tensor x, weight, indices, out;
  std::optional<Tensor> offsets;

  int64_t rows() const { return indices.size(0); }
  int64_t k() const { return offsets ? 1 : indices.size(1); }
  int64_t D() const { return x.size(1); }
  int64_t index_column() const { return offsets ? 0 : indices.stride(1); }
  Tokens tokens() const { return {offsets ? data<int64_t>(*offsets) : nullptr, x.size(0)}; }
};

template <typename T, int Width, int DotBits, int Ahead, bool Ragged = false>
void run(const Call& call, const Operands& given, int threads) {
  Panels panels = Panels::of(given.D(), Width);
  int64_t tiles = given.rows() * ((given.k() + (1 << DotBits) - 1) >> DotBits);
  call.launch("sddmm_dots", sddmm_dots<T, Width, DotBits, Ahead, Ragged>, panels.blocks(tiles, threads), threads, 0,
              data<T>(given.x), data<T>(given.weight), data<int64_t>(given.indices), given.tokens(),
              mutable_data<T>(given.out), given.rows(), given.k(), given.D(), panels.lane_bits, given.x.stride(0),
              given.weight.stride(0), given.indices.stride(0), given.index_column());
}

template <typename T> void run_column(const Call& call, const Operands& given) {
  call.launch("sddmm_column", sddmm_column<T>, gather_blocks(given.rows()), kGatherBlock, 0, data<T>(given.x),
              data<T>(given.weight), data<int64_t>(given.indices), given.tokens(), mutable_data<T>(given.out),
              given.rows(), given.x.stride(0), given.weight.stride(0), given.indices.stride(0));
}

}  // namespace

Tensor sddmm(const Tensor& x, const Tensor& weight, const Tensor& indices, const std::optional<Tensor>& offsets) {
  Call call(x);
  check_indices(call, "sddmm", indices, weight.size(0), offsets);
  Tensor out = offsets ? allocate(x, {indices.size(0)}, x.scalar_type())
                       : allocate(x, {indices.size(0), indices.size(1)}, x.scalar_type());
  if (x.size(0) == 0) {  // all of it is padding
    torch::stable::zero_(out);
    return out;
  }
  Operands given{with_unit_stride(x), with_unit_stride(weight), indices, out, {}};
  if (offsets) given.offsets = as_contiguous(*offsets, ScalarType::Long);
  with_type(dtype_of(x), [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int width = Packet<T>::size;
    bool packets = takes_packets<T>(given.x, given.D()) && takes_packets<T>(given.weight, given.D());
    // Too few tiles to fill the machine: a group for every dot product, on blocks of one warp.
    bool few = given.rows() * given.k() < int64_t{16 << kDotBits} * call.multiprocessors();
    int threads = few ? kWarp : kGatherBlock;
    if (offsets && given.D() == 1) run_column<T>(call, given);
    else if (offsets && packets) run<T, width, 0, 4, true>(call, given, threads);
    else if (offsets) run<T, 1, 0, 4, true>(call, given, threads);
    else if (packets && few) run<T, width, 0, 4>(call, given, threads);
    else if (packets) run<T, width, kDotBits, 1>(call, given, threads);
    else if (few) run<T, 1, 0, 4>(call, given, threads);
    else run<T, 1, kDotBits, 2>(call, given, threads);
  });
  return out;
}

FASTSPARSE_REGISTER(fastsparse_cuda, FASTSPARSE_DEVICE_KEY, sddmm)

}  // namespace fastsparse::cuda
