// The gradients of the gated recurrences, against time: device code.
//
// What reaches the state before a step, J_t^T (d_h_t + what reaches the state after it), is affine in the latter, with
// the derivative J_t at states that are known: a scan (scan.cuh). A step computes its gates again, twice where a line is
// cut into chunks: once for the map, once for the way back itself (csrc/cells.h). What it adds to the weights' gradients
// is summed by each thread over its steps, then over a block's chunks, and by gated_weights over sequences and segments.
//
// Bytes an element-step: 32 in fp32, 40 of pairs of states: u, states and their gradients in, d_u out. At B=8, T=2048,
// H=1024 that is .5 GB, 125 us at 4.3 TB/s. Six to ten operations of the special function unit, or twice that, an
// element-step: at 16 a cycle they take less than half as long.
#pragma once

#include "cells.h"
#include "cuda/activations.cuh"
#include "cuda/scan.cuh"

namespace fastsparse::cuda {

template <typename Type, template <typename> typename Form> struct BackSteps {
  using T = Type;
  using C = Accumulator<T>;
  using Cell = Form<Math<C>>;
  static constexpr int kStates = Cell::kStates, kSums = Cell::kWeights;
  static constexpr int kBlocks = sizeof(T) == 8 || kStates > 1 ? 1 : 2;
  static constexpr int kHeld = sizeof(T) == 8 ? 2 : 4;
  struct Step { T u[3], before[kStates], gradient[kStates]; };
  using Line = cuda::Line<C, kSums>;

  const T* u;                    // (B, T, 3, H)
  const T *weight, *peephole;    // (3, H) and (2, H), if the cell has that
  const T* first[kStates];       // (S, H), or null: 0
  const T* states[kStates];      // (B, T, H)
  const T* gradients[kStates];   // of the states, (B, T, H), or null: 0
  T* d_u;                        // (B, T, 3, H), or null: not needed
  T* d_first[kStates];           // (S, H), or null: not needed

  __device__ __forceinline__ Step load(const Line& line, int64_t element, int64_t i) const {
    Step step{};
#pragma unroll
    for (int g = 0; g < 3; ++g) step.u[g] = u[3 * element + g * line.H + line.channel];
    const bool is_first = i + 1 == line.length;
#pragma unroll
    for (int j = 0; j < kStates; ++j) {
      if (!is_first) step.before[j] = states[j][element - line.H + line.channel];
      else if (first[j]) step.before[j] = first[j][line.s * line.H + line.channel];
      if (gradients[j]) step.gradient[j] = gradients[j][element + line.channel];
    }
    return step;
  }

  __device__ __forceinline__ Affine<C, kStates> map(const Line& line, const Step& step) const {
    C u[3], state[kStates], J[kStates * kStates];
    widen_to(step.u, u);
    widen_to(step.before, state);
    cell(line).step(u, state, J);
    Affine<C, kStates> map;
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      map.b[i] = 0;
#pragma unroll
      for (int j = 0; j < kStates; ++j) {
        map.A[i * kStates + j] = J[j * kStates + i];
        map.b[i] += J[j * kStates + i] * widen(step.gradient[j]);
      }
    }
    return map;
  }

  __device__ __forceinline__ void advance(Line& line, const Step& step, C (&through)[kStates], int64_t element,
                                          bool kept) const {
    C u[3], before[kStates], d_gates[3], d_w[kSums] = {};
    widen_to(step.u, u);
    widen_to(step.before, before);
#pragma unroll
    for (int j = 0; j < kStates; ++j) through[j] += widen(step.gradient[j]);
    cell(line).back(u, before, through, d_gates, d_w);
    if (!kept) return;
#pragma unroll
    for (int w = 0; w < kSums; ++w) line.sums[w] += d_w[w];
#pragma unroll
    for (int g = 0; g < 3; ++g)
      if (d_u) d_u[3 * element + g * line.H + line.channel] = narrow<T>(d_gates[g]);
  }

  __device__ __forceinline__ void start(const Line&, C (&through)[kStates]) const {
#pragma unroll
    for (int j = 0; j < kStates; ++j) through[j] = 0;
  }

  __device__ __forceinline__ void finish(const Line& line, const C (&through)[kStates]) const {
#pragma unroll
    for (int j = 0; j < kStates; ++j)
      if (d_first[j]) d_first[j][line.s * line.H + line.channel] = narrow<T>(through[j]);
  }

 private:
  // Out of the first-level cache: registers have no room for them beside the steps.
  __device__ __forceinline__ Cell cell(const Line& line) const {
    Cell cell;
#pragma unroll
    for (int w = 0; w < kSums; ++w)
      cell.w[w] = widen(w < 3 ? weight[w * line.H + line.channel] : peephole[(w - 3) * line.H + line.channel]);
    return cell;
  }

  template <int n> __device__ __forceinline__ static void widen_to(const T (&from)[n], C (&to)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) to[i] = widen(from[i]);
  }
};

inline constexpr int kWeightSlices = 16;  // of the sequences and segments whose sums a block adds

// The weights' gradients, (3, H) and (rows - 3, H), of the sums (segments, rows, S, H). A block has 32 columns of a row.
template <typename T>
__global__ void __launch_bounds__(kWarp * kWeightSlices)
    gated_weights(const Accumulator<T>* sums, T* d_weight, T* d_peephole, int64_t S, int64_t H, int segments, int rows) {
  using C = Accumulator<T>;
  struct Shared { C sums[kWeightSlices][kWarp]; };
  auto& shared = shared_storage<Shared>();
  const int lane = int(threadIdx.x) % kWarp, slice = int(threadIdx.x) / kWarp;
  const int64_t channel = int64_t(blockIdx.x / unsigned(rows)) * kWarp + lane, row = blockIdx.x % unsigned(rows);
  C sum = 0;
  if (channel < H)
    for (int64_t segment = 0; segment < segments; ++segment)
      for (int64_t s = slice; s < S; s += kWeightSlices) sum += sums[((segment * rows + row) * S + s) * H + channel];
  shared.sums[slice][lane] = sum;
  __syncthreads();
  if (slice > 0 || channel >= H) return;
  for (int other = 1; other < kWeightSlices; ++other) sum += shared.sums[other][lane];
  if (row < 3) d_weight[row * H + channel] = narrow<T>(sum);
  else d_peephole[(row - 3) * H + channel] = narrow<T>(sum);
}

}  // namespace fastsparse::cuda
