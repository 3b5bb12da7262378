// How scans (scan.cuh) are laid out on a GPU, and launched.
#pragma once

#include <algorithm>
#include <bit>

#include "cuda/edge.h"
#include "cuda/rows.h"
#include "cuda/scan.cuh"

namespace fastsparse::cuda {

// The sequences of a batch (B, T, ...), or those of cu_seqlens, whose tensor must outlive the launches.
struct Batch {
  int64_t S, T, H;
  const int64_t* bounds;

  Batch(int64_t B, int64_t T, int64_t H, const std::optional<Tensor>& cu_seqlens)
      : S(cu_seqlens ? cu_seqlens->size(0) - 1 : B), T(T), H(H),
        bounds(cu_seqlens ? data<int64_t>(*cu_seqlens) : nullptr) {}
};

inline std::optional<Tensor> contiguous_bounds(const std::optional<Tensor>& cu_seqlens) {
  if (!cu_seqlens) return std::nullopt;
  return as_contiguous(*cu_seqlens, ScalarType::Long);
}

// Of 512 threads a multiprocessor, each of which has 64 bytes of fp32 on its way: 4.3 MB on 132, where 4.3 TB/s that take
// a microsecond to come need as many.
template <typename Steps> struct ScanPlan {
  Time time;
  unsigned groups, threads;

  ScanPlan(const Call& call, const Batch& batch, bool against)
      : time{batch.bounds, batch.T, batch.H, batch.S * batch.H, batch.T, 1, 0, against} {
    const int64_t lines = time.lines, T = time.T;
    const int64_t least = 32 / std::min<int64_t>(4, sizeof(typename Steps::T));  // lines: a sector, 32 bytes
    auto power = [](int64_t count) { return int64_t(std::bit_ceil(uint64_t(std::max<int64_t>(1, count)))); };
    int64_t filling = int64_t{512} * call.multiprocessors() / std::max<int64_t>(1, lines);
    int64_t chunks = int64_t(std::bit_floor(uint64_t(std::max<int64_t>(1, filling))));
    chunks = std::min({chunks, power((T + Steps::kHeld - 1) / Steps::kHeld), int64_t{kScanThreads} / least});
    int64_t width = std::min(chunks == 1 ? 128 : kScanThreads / chunks, std::max(least, power(lines)));
    width = std::max(width, kWarp / chunks);
    int64_t blocks = (lines + width - 1) / width, tile = chunks * Steps::kHeld;
    if (width == least && blocks > 0 && 2 * blocks <= call.multiprocessors()) {
      int64_t segments = std::max<int64_t>(1, std::min(call.multiprocessors() / blocks, T / (2 * tile)));
      time.segment = ((T + segments - 1) / segments + tile - 1) / tile * tile;
      time.segments = int((T + time.segment - 1) / std::max<int64_t>(1, time.segment));
      time.segments = std::max(1, time.segments);
    }
    time.line_bits = std::countr_zero(uint64_t(width));
    groups = unsigned(blocks);
    threads = unsigned(width * chunks);
  }

  // sums: null, or of segments * kSums * lines.
  void run(const Call& call, const char* name, const Steps& steps, const Tensor& like, const Tensor* sums = nullptr) {
    using C = typename Steps::C;
    using Map = Affine<C, Steps::kStates>;
    std::optional<Tensor> maps;
    if (time.segments > 1) {
      Time but_last = time;
      --but_last.segments;
      maps = allocate(like, {but_last.segments * time.lines, int64_t(sizeof(Map) / sizeof(C))},
                      accumulator_of(like.scalar_type()));
      call.launch(name, scan_maps<Steps>, groups * unsigned(but_last.segments), threads, 0, steps, but_last,
                  static_cast<Map*>(maps->mutable_data_ptr()));
    }
    call.launch(name, scan_steps<Steps>, groups * unsigned(time.segments), threads, 0, steps, time,
                maps ? static_cast<const Map*>(maps->const_data_ptr()) : nullptr,
                sums ? mutable_data<C>(*sums) : nullptr);
  }
};

}  // namespace fastsparse::cuda
