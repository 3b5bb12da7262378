// The gated recurrences, whose steps are those of csrc/cells.h, along time: the arguments, and the loop.
#pragma once

#include <cstdint>

#include "cells.h"
#include "dtype.h"
#include "cpu/isa.h"
#include "cpu/sequences.h"

namespace fastsparse {

struct GatedRecurrenceArgs {
  CellKind cell;
  Sequences sequences;
  Series u;             // (B, T, 3, H)
  const void* weights;  // those of csrc/cells.h (kWeights, H), contiguous, of the accumulation type
  Series start[2];      // (S, H) of each state, or none: zeros
  Series states[2];     // (B, T, H) of each state, contiguous, written
  int32_t* passes;      // (S, H), written by the solvers that are parallel in time
  int64_t H;
  DType dtype;
};

// Sequences of one length, where they are more than one.
FASTSPARSE_DECLARE_KERNEL(void gated_recurrence(const GatedRecurrenceArgs& args, Range sequences, Range channels))

// A sequence's channels, no more than its time_plan. Where it leaves kGivenUp in args.passes states aren't right.
FASTSPARSE_DECLARE_KERNEL(void gated_recurrence_by_shooting(const GatedRecurrenceArgs& args, int64_t sequence,
                                                             Range channels, void* scratch))
FASTSPARSE_DECLARE_KERNEL(void gated_recurrence_by_newton(const GatedRecurrenceArgs& args, int64_t sequence,
                                                           Range channels, void* scratch))

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

// How many sequences of one length to hand to a kernel at once, where their channels alone don't fill its vectors.
inline constexpr int64_t kSequencesTogether = 4;

}  // namespace fastsparse

#ifdef FASTSPARSE_ISA
#include "cpu/activations.h"
#include "cpu/lanes.h"

namespace fastsparse::FASTSPARSE_ISA {

// So many vectors take a step together, for a vector alone mostly waits: a step of one takes 40 ns, of four 47 (GRU in
// fp32, Zen 4).
inline constexpr int kTogether = 4;

// How many steps ahead u is brought into the second level of the cache: of a row a task reads a few lines, then of the
// next, which the hardware doesn't foresee. (Zen 4, GRU of B=8 T=1024 H=256 fp32: half the time of without; 4 to 32
// steps are much alike.)
inline constexpr int64_t kStepsAhead = 16;

// K vectors, from their first step to their last: neighbouring channels of a sequence or, kAcross, the same channels of
// sequences that follow one another and have one length.
template <template <typename> class Cell, typename T, int K, bool kAcross, typename Lanes>
void run_steps(const GatedRecurrenceArgs& args, int64_t sequence, int64_t channel, Lanes lanes) {
  using C = Accumulator<T>;
  using Numbers = Cell<Activations<C, K>>;
  using V = Pack<C, K>;
  constexpr int kStates = Numbers::kStates;
  auto apart = [](int64_t row) { return kAcross ? row : int64_t{kLanes<C>}; };  // from one vector to the next
  Steps steps = steps_of(args.sequences, sequence);
  Numbers cell;
  V state[kStates];
  const T* u[3];
  T* out[kStates];
  for (int i = 0; i < 3; ++i) u[i] = at<T>(args.u, steps.row, steps.begin, channel) + i * args.u.part;
  for (int i = 0; i < kStates; ++i) {
    out[i] = const_cast<T*>(at<T>(args.states[i], steps.row, steps.begin, channel));
    state[i] = V(0);
    if (args.start[i].data)
      state[i] = V::of([&](int k) __attribute__((always_inline)) {
        return lanes.load(at<T>(args.start[i], sequence, 0, channel) + k * apart(args.start[i].row));
      });
  }
  for (int i = 0; i < Numbers::kWeights; ++i)
    cell.w[i] = V::of([&](int k) __attribute__((always_inline)) {
      return lanes.load(static_cast<const C*>(args.weights) + i * args.H + channel + k * apart(0));
    });
  int64_t u_step = args.u.step, u_apart = apart(args.u.row), out_step = args.H, out_apart = apart(args.states[0].row);
  for (int64_t left = steps.end - steps.begin; left > 0; --left) {
    V now[3];
    int64_t ahead = left > kStepsAhead ? kStepsAhead * u_step : 0;
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      now[i] = V::of([&](int k) __attribute__((always_inline)) {
        prefetch(u[i] + k * u_apart + ahead);
        return lanes.load(u[i] + k * u_apart);
      });
      u[i] += u_step;
    }
    cell.step(now, state);
#pragma GCC unroll 2
    for (int i = 0; i < kStates; ++i) {
      V::each([&](int k) __attribute__((always_inline)) { lanes.store(state[i].v[k], out[i] + k * out_apart); });
      out[i] += out_step;
    }
  }
}

// The definition: step by step. A channel's states are the same whatever goes along with it.
template <template <typename> class Cell, typename T>
void sequential(const GatedRecurrenceArgs& args, Range sequences, Range channels) {
  using C = Accumulator<T>;
  int64_t s = sequences.begin;
  auto across = [&]<int K>() {
    for (; s + K <= sequences.end; s += K)
      for_vectors<C>(channels, [&](int64_t h, auto lanes) { run_steps<Cell, T, K, true>(args, s, h, lanes); });
  };
  if (sequences.end - sequences.begin > 1) across.template operator()<kTogether>(), across.template operator()<2>();
  for (; s < sequences.end; ++s) {
    int64_t h = channels.begin;
    auto along = [&]<int K>() {
      for (; h + K * kLanes<C> <= channels.end; h += K * kLanes<C>)
        run_steps<Cell, T, K, false>(args, s, h, AllLanes{});
    };
    along.template operator()<kTogether>(), along.template operator()<2>(), along.template operator()<1>();
    if (h < channels.end) run_steps<Cell, T, 1, false>(args, s, h, FirstLanes{int(channels.end - h)});
  }
}

}  // namespace fastsparse::FASTSPARSE_ISA
#endif
