// What the GRU and the LSTM have in common: the arguments, and the loop over time.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "cpu/isa.h"
#include "cpu/sequences.h"

namespace fastsparse {

struct GatedRecurrenceArgs {
  Sequences sequences;
  Series u;             // (B, T, 3, H)
  const void* weights;  // those of csrc/cells.h (kWeights, H), contiguous, of the accumulation type
  Series start[2];      // (S, H) of each state, or none: zeros
  Series states[2];     // (B, T, H) of each state, contiguous, written
  int32_t* passes;      // (S, H), written by the solvers that are parallel in time
  int64_t H;
  DType dtype;
};

// How a sequence is cut into chunks of time, so that as many channels' chunks fill so many lanes.
struct TimePlan { int64_t chunks, length, channels; };

// Chunks of 64 steps or more: in shorter ones fewer states forget what their chunk started from.
inline TimePlan time_plan(int64_t steps, int64_t lanes, int64_t H) {
  int64_t chunks = (steps + 63) / 64;
  if (chunks > lanes) chunks = lanes;
  int64_t length = (steps + chunks - 1) / chunks, used = (steps + length - 1) / length, channels = lanes / used;
  return {used, length, channels < H ? channels : H};
}

// The scratch of the solvers that are parallel in time is rows of so many bytes, one number a lane, whatever the level.
inline constexpr int64_t kRowBytes = 256, kTileSteps = 16;
inline int64_t shooting_rows(int64_t states) { return 3 * kTileSteps + 10 + states * (kTileSteps + 6 + states); }
inline int64_t newton_rows(int64_t states, int64_t length) {
  return 3 * kTileSteps + 10 + states * (6 + states) + length * states * (2 + states);
}

// How many sequences to hand to a kernel at once where channels alone don't fill its vectors.
inline constexpr int64_t kSequencesTogether = 4;

}  // namespace fastsparse

#ifdef FASTSPARSE_ISA
#include "cells.h"
#include "cpu/activations.h"
#include "cpu/lanes.h"

namespace fastsparse::FASTSPARSE_ISA {

// So many vectors of channels take a step together: one after the other each would wait for its last, for some 120
// cycles, of which it works 40 (Zen 4).
inline constexpr int kTogether = 4;

// How many steps ahead u is asked for: a step of four vectors takes some 200 cycles.
inline constexpr int64_t kStepsAhead = 8;

// K vectors of channels, from their first step to their last. `sequence` and `channel` say which; in length all
// sequences are alike.
template <template <typename> class Cell, typename T, int K, typename Lanes>
void run_steps(const GatedRecurrenceArgs& args, const int64_t (&sequence)[K], const int64_t (&channel)[K],
               Lanes lanes) {
  using C = Accumulator<T>;
  using Numbers = Cell<Activations<C, K>>;
  using V = Pack<C, K>;
  constexpr int kStates = Numbers::kStates;
  Numbers cell;
  V state[kStates];
  const T* u[3][K];
  T* out[kStates][K];
  int64_t count = 0;
  for (int k = 0; k < K; ++k) {
    Steps steps = steps_of(args.sequences, sequence[k]);
    count = steps.end - steps.begin;
    for (int i = 0; i < 3; ++i) u[i][k] = at<T>(args.u, steps.row, steps.begin, channel[k]) + i * args.u.part;
    for (int i = 0; i < kStates; ++i) {
      out[i][k] = const_cast<T*>(at<T>(args.states[i], steps.row, steps.begin, channel[k]));
      const T* start = at<T>(args.start[i], sequence[k], 0, channel[k]);
      state[i].v[k] = args.start[i].data ? lanes.load(start) : Vector<C>{};
    }
    for (int i = 0; i < Numbers::kWeights; ++i)
      cell.w[i].v[k] = lanes.load(static_cast<const C*>(args.weights) + i * args.H + channel[k]);
  }
  int64_t from = 0, to = 0, ahead = kStepsAhead * args.u.step;
  for (int64_t t = 0; t < count; ++t, from += args.u.step, to += args.H) {
    V now[3];
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i)
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        if (t + kStepsAhead < count) prefetch<true>(u[i][k] + from + ahead);
        now[i].v[k] = lanes.load(u[i][k] + from);
      }
    cell.step(now, state);
#pragma GCC unroll 2
    for (int i = 0; i < kStates; ++i)
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) lanes.store(state[i].v[k], out[i][k] + to);
  }
}

// Neighbouring vectors of channels of one sequence.
template <template <typename> class Cell, typename T, int K, typename Lanes>
void run_channels(const GatedRecurrenceArgs& args, int64_t sequence, int64_t channel, Lanes lanes) {
  int64_t sequences[K], channels[K];
  for (int k = 0; k < K; ++k) sequences[k] = sequence, channels[k] = channel + k * kLanes<Accumulator<T>>;
  run_steps<Cell, T, K>(args, sequences, channels, lanes);
}

// The same channels of sequences that follow one another.
template <template <typename> class Cell, typename T, int K, typename Lanes>
void run_sequences(const GatedRecurrenceArgs& args, int64_t sequence, int64_t channel, Lanes lanes) {
  int64_t sequences[K], channels[K];
  for (int k = 0; k < K; ++k) sequences[k] = sequence + k, channels[k] = channel;
  run_steps<Cell, T, K>(args, sequences, channels, lanes);
}

// The definition: step by step. A channel's states are the same whatever goes along with it.
template <template <typename> class Cell, typename T>
void sequential(const GatedRecurrenceArgs& args, Range sequences, Range channels) {
  using C = Accumulator<T>;
  static_assert(kTogether == kSequencesTogether);
  if (sequences.end - sequences.begin == kTogether) {
    for_vectors<C>(channels, [&](int64_t channel, auto lanes) {
      run_sequences<Cell, T, kTogether>(args, sequences.begin, channel, lanes);
    });
    return;
  }
  for (int64_t s = sequences.begin; s < sequences.end; ++s) {
    int64_t h = channels.begin;
    for (; h + 4 * kLanes<C> <= channels.end; h += 4 * kLanes<C>) run_channels<Cell, T, 4>(args, s, h, AllLanes{});
    for (; h + 2 * kLanes<C> <= channels.end; h += 2 * kLanes<C>) run_channels<Cell, T, 2>(args, s, h, AllLanes{});
    for_vectors<C>({h, channels.end},
                   [&](int64_t channel, auto lanes) { run_channels<Cell, T, 1>(args, s, channel, lanes); });
  }
}

}  // namespace fastsparse::FASTSPARSE_ISA
#endif
