#include "cuda/sddmm.cuh"

#include "cuda/edge.h"
#include "cuda/rows.h"

namespace fastsparse::cuda {

namespace {

template <typename T, int Width, int DotBits, int Ahead>
void run(const Call& call, const Tensor& x, const Tensor& weight, const Tensor& indices, const Tensor& out,
         const Panels& panels, int threads) {
  int64_t N = indices.size(0), k = indices.size(1), tiles = N * ((k + (1 << DotBits) - 1) >> DotBits);
  call.launch("sddmm_dots", sddmm_dots<T, Width, DotBits, Ahead>, panels.blocks(tiles, threads), threads, 0, data<T>(x),
              data<T>(weight), data<int64_t>(indices), mutable_data<T>(out), N, k, x.size(1), panels.lane_bits,
              x.stride(0), weight.stride(0), indices.stride(0), indices.stride(1));
}

}  // namespace

Tensor sddmm(const Tensor& x, const Tensor& weight, const Tensor& indices) {
  Call call(x);
  int64_t N = indices.size(0), k = indices.size(1), D = x.size(1);
  check_indices(call, "sddmm", indices, weight.size(0));
  Tensor rows = with_unit_stride(x), atoms = with_unit_stride(weight), out = allocate(x, {N, k}, x.scalar_type());
  with_type(dtype_of(x), [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int width = Packet<T>::size;
    // Too few tiles to fill the machine: a group for every dot product, on blocks of one warp.
    bool few = N * k < int64_t{16 << kDotBits} * call.multiprocessors();
    if (takes_packets<T>(rows, D) && takes_packets<T>(atoms, D)) {
      Panels panels = Panels::of(D, width);
      if (few) run<T, width, 0, 4>(call, rows, atoms, indices, out, panels, kWarp);
      else run<T, width, kDotBits, 1>(call, rows, atoms, indices, out, panels, kGatherBlock);
    } else {
      Panels panels = Panels::of(D, 1);
      if (few) run<T, 1, 0, 4>(call, rows, atoms, indices, out, panels, kWarp);
      else run<T, 1, kDotBits, 2>(call, rows, atoms, indices, out, panels, kGatherBlock);
    }
  });
  return out;
}

FASTSPARSE_REGISTER(fastsparse_cuda, FASTSPARSE_DEVICE_KEY, sddmm)

}  // namespace fastsparse::cuda
