// The gradient of a gated recurrence, in one pass against time.
//
// The states are known, so that all gates are computed again, each from the state before it; only what reaches a state,
// lambda[t] = d_h[t] + J[t + 1]^T lambda[t + 1], goes from step to step. Sums over time are taken in spans of steps, to
// keep their rounding small, and over the sequences of a group in their order.
#pragma once

#include "cells.h"
#include "dtype.h"
#include "cpu/isa.h"
#include "cpu/sequences.h"

namespace fastsparse {

struct RecurrenceBackwardArgs {
  Sequences sequences;
  Series u;                         // (B, T, 3, H)
  Series states[2], start[2];       // of the LSTM c and h: (B, T, H), and (S, H)
  Series d_states[2];               // (B, T, H)
  const void* weights[5];           // (H) each, as many as the cell has
  void* d_u;                        // (B, T, 3, H), or null
  void* d_weights;                  // (groups, weights, H) of the accumulation type, or null
  void* d_start[2];                 // (S, H), or null
  int64_t H;
  DType dtype;
};

}  // namespace fastsparse

#ifdef FASTSPARSE_ISA
#include "cpu/activations.h"
#include "cpu/lanes.h"

namespace fastsparse::FASTSPARSE_ISA {

namespace {

constexpr int64_t kSpan = 64;  // steps that are summed up on their own

template <typename V, typename T, typename Lanes> inline V load_pack(const T* from, Lanes lanes) {
  constexpr int each = kLanes<Accumulator<T>>;
  V result;
#pragma GCC unroll 8
  for (int k = 0; k < int(sizeof result.v / sizeof result.v[0]); ++k) result.v[k] = lanes.load(from + k * each);
  return result;
}

template <typename V, typename T, typename Lanes> inline void store_pack(const V& value, T* to, Lanes lanes) {
  constexpr int each = kLanes<Accumulator<T>>;
#pragma GCC unroll 8
  for (int k = 0; k < int(sizeof value.v / sizeof value.v[0]); ++k) lanes.store(value.v[k], to + k * each);
}

// The channels of K vectors.
template <template <typename> typename Cell, typename T, int K, typename Lanes>
void run_back(const RecurrenceBackwardArgs& args, int64_t group, Range sequences, int64_t channel, Lanes lanes) {
  using C = Accumulator<T>;
  using V = Pack<C, K>;
  using ThisCell = Cell<Activations<C, K>>;
  constexpr int states = ThisCell::kStates, weights = ThisCell::kWeights;
  ThisCell cell;
  for (int i = 0; i < weights; ++i) cell.w[i] = load_pack<V>(static_cast<const T*>(args.weights[i]) + channel, lanes);

  V sums[weights];
  for (V& sum : sums) sum = V(0);
  for (int64_t s = sequences.begin; s < sequences.end; ++s) {
    Steps steps = steps_of(args.sequences, s);
    V through[states];
    for (V& state : through) state = V(0);
    for (int64_t end = steps.end; end > steps.begin;) {
      int64_t begin = end - steps.begin > kSpan ? end - kSpan : steps.begin;
      V part[weights];
      for (V& sum : part) sum = V(0);
      for (int64_t t = end - 1; t >= begin; --t) {
        V u[3], before[states], d_u[3];
        const T* from = at<T>(args.u, steps.row, t, channel);
        for (int i = 0; i < 3; ++i) u[i] = load_pack<V>(from + i * args.u.part, lanes);
        for (int i = 0; i < states; ++i) {
          const T* state = t > steps.begin ? at<T>(args.states[i], steps.row, t - 1, channel)
                                           : at<T>(args.start[i], s, 0, channel);
          before[i] = load_pack<V>(state, lanes);
          through[i] += load_pack<V>(at<T>(args.d_states[i], steps.row, t, channel), lanes);
        }
        cell.back(u, before, through, d_u, part);
        if (args.d_u) {
          T* to = static_cast<T*>(args.d_u) + (steps.row * args.sequences.T + t) * 3 * args.H + channel;
          for (int i = 0; i < 3; ++i) store_pack(d_u[i], to + i * args.H, lanes);
        }
      }
      for (int i = 0; i < weights; ++i) sums[i] += part[i];
      end = begin;
    }
    for (int i = 0; i < states; ++i)
      if (args.d_start[i]) store_pack(through[i], static_cast<T*>(args.d_start[i]) + s * args.H + channel, lanes);
  }
  if (args.d_weights)
    for (int i = 0; i < weights; ++i)
      store_pack(sums[i], static_cast<C*>(args.d_weights) + (group * weights + i) * args.H + channel, lanes);
}

template <template <typename> typename Cell, int K>
void recurrence_backward(const RecurrenceBackwardArgs& args, int64_t group, Range sequences, Range channels) {
  with_type(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int lanes = kLanes<Accumulator<T>>;
    int64_t h = channels.begin;
    if constexpr (K > 1)
      for (; h + K * lanes <= channels.end; h += K * lanes)
        run_back<Cell, T, K>(args, group, sequences, h, AllLanes{});
    for_vectors<Accumulator<T>>({h, channels.end}, [&](int64_t channel, auto these) {
      run_back<Cell, T, 1>(args, group, sequences, channel, these);
    });
  });
}

}  // namespace

}  // namespace fastsparse::FASTSPARSE_ISA
#endif
