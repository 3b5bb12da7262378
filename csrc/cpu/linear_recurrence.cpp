#include "cpu/linear_recurrence.h"

#include "cpu/lanes.h"

namespace fastsparse::FASTSPARSE_ISA {

namespace {

// Up to so many vectors of states go along together: they hide the latency of each other's multiply-add, and what is
// read of a step is several neighbouring cache lines.
constexpr int kTogether = 8;

// The states of N vectors of channels, kP of each channel, from the first step to the last. They stay in registers.
template <typename T, int kP, int N, typename Lanes>
void run(const LinearRecurrenceArgs& args, int64_t sequence, int64_t channel, Lanes lanes) {
  using C = Accumulator<T>;
  using V = Vector<C>;
  Steps steps = steps_of(args.sequences, sequence);
  if (steps.begin == steps.end) return;
  int64_t first = args.reverse ? steps.end - 1 : steps.begin, sign = args.reverse ? -1 : 1;
  const T* a = at<T>(args.a, steps.row, first, channel);
  const T* b = at<T>(args.b, steps.row, first, channel);
  T* h = const_cast<T*>(at<T>(args.h, steps.row, first, channel));
  int64_t a_step = sign * args.a.step, b_step = sign * args.b.step, h_step = sign * args.h.step;

  V state[kP][N];
  int64_t left = steps.end - steps.begin;
  if (args.h0.data) {
    const T* h0 = at<T>(args.h0, sequence, 0, channel);
    for (int i = 0; i < kP; ++i)
      for (int n = 0; n < N; ++n) state[i][n] = lanes.load(h0 + i * args.h0.part + n * kLanes<C>);
  } else {
    for (int i = 0; i < kP; ++i)
      for (int n = 0; n < N; ++n) {
        state[i][n] = lanes.load(b + i * args.b.part + n * kLanes<C>);
        lanes.store(state[i][n], h + i * args.h.part + n * kLanes<C>);
      }
    --left, a += a_step, b += b_step, h += h_step;
  }
  for (; left > 0; --left, a += a_step, b += b_step, h += h_step)
    for (int n = 0; n < N; ++n) {
      V next[kP];
      for (int i = 0; i < kP; ++i) {
        next[i] = lanes.load(b + i * args.b.part + n * kLanes<C>);
        for (int j = 0; j < kP; ++j)
          next[i] += lanes.load(a + i * args.a.part + j * args.a.column + n * kLanes<C>) * state[j][n];
      }
      for (int i = 0; i < kP; ++i) {
        state[i][n] = next[i];
        lanes.store(next[i], h + i * args.h.part + n * kLanes<C>);
      }
    }
}

template <typename T, int kP> void run_all(const LinearRecurrenceArgs& args, int64_t sequence, Range channels) {
  constexpr int lanes = kLanes<Accumulator<T>>, most = kTogether / kP, half = most / 2;
  int64_t h = channels.begin;
  for (; h + most * lanes <= channels.end; h += most * lanes) run<T, kP, most>(args, sequence, h, AllLanes{});
  for (; h + half * lanes <= channels.end; h += half * lanes) run<T, kP, half>(args, sequence, h, AllLanes{});
  for_vectors<Accumulator<T>>({h, channels.end},
                              [&](int64_t channel, auto these) { run<T, kP, 1>(args, sequence, channel, these); });
}

}  // namespace

void linear_recurrence(const LinearRecurrenceArgs& args, int64_t sequence, Range channels) {
  with_type(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    args.pairs ? run_all<T, 2>(args, sequence, channels) : run_all<T, 1>(args, sequence, channels);
  });
}

}  // namespace fastsparse::FASTSPARSE_ISA
