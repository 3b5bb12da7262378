#include "cpu/linear_recurrence.h"

#include "cpu/linear_vectors.h"

namespace fastsparse::FASTSPARSE_ISA {

namespace {

// All steps of up to N vectors of channels, kP states of each channel.
template <typename T, int kP, int N, typename Vectors>
void run(const LinearRecurrenceArgs& args, int64_t sequence, const Vectors& vectors) {
  using C = Accumulator<T>;
  using V = Vector<C>;
  Steps steps = steps_of(args.sequences, sequence);
  if (steps.begin == steps.end) return;
  int64_t first = args.reverse ? steps.end - 1 : steps.begin, sign = args.reverse ? -1 : 1;
  const T *a = at<T>(args.a, steps.row, first, 0), *b = at<T>(args.b, steps.row, first, 0);
  T* h = const_cast<T*>(at<T>(args.h, steps.row, first, 0));
  int64_t a_step = sign * args.a.step, b_step = sign * args.b.step, h_step = sign * args.h.step;

  V state[kP][N];
  int64_t left = steps.end - steps.begin;
  if (args.h0.data) {
    const T* h0 = at<T>(args.h0, sequence, 0, 0);
    vectors([&](int64_t channel, int n, auto lanes) {
      for (int i = 0; i < kP; ++i) state[i][n] = lanes.load(h0 + i * args.h0.part + channel);
    });
  } else {
    vectors([&](int64_t channel, int n, auto lanes) {
      for (int i = 0; i < kP; ++i) {
        state[i][n] = lanes.load(b + i * args.b.part + channel);
        lanes.store(state[i][n], h + i * args.h.part + channel);
      }
    });
    --left, a += a_step, b += b_step, h += h_step;
  }
  for (; left > 0; --left, a += a_step, b += b_step, h += h_step)
    vectors([&](int64_t channel, int n, auto lanes) {
      V next[kP];
      for (int i = 0; i < kP; ++i) {
        next[i] = lanes.load(b + i * args.b.part + channel);
        for (int j = 0; j < kP; ++j)
          next[i] += lanes.load(a + i * args.a.part + j * args.a.column + channel) * state[j][n];
      }
      for (int i = 0; i < kP; ++i) {
        state[i][n] = next[i];
        lanes.store(next[i], h + i * args.h.part + channel);
      }
    });
}

template <typename T, int kP> void run_all(const LinearRecurrenceArgs& args, int64_t sequence, Range channels) {
  with_vectors<Accumulator<T>>(channels, args.reverse, [&](auto most, const auto& vectors) {
    run<T, kP, decltype(most)::value>(args, sequence, vectors);
  });
}

}  // namespace

void linear_recurrence(const LinearRecurrenceArgs& args, int64_t sequence, Range channels) {
  with_type(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    args.pairs ? run_all<T, 2>(args, sequence, channels) : run_all<T, 1>(args, sequence, channels);
  });
}

}  // namespace fastsparse::FASTSPARSE_ISA
