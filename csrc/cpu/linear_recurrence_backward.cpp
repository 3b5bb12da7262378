#include "cpu/linear_recurrence_backward.h"

#include "cpu/linear_vectors.h"

namespace fastsparse::FASTSPARSE_ISA {

namespace {

// All steps of up to N vectors of channels, kP states of each channel, from the last one on.
template <typename T, int kP, int N, typename Vectors>
void run(const LinearRecurrenceBackwardArgs& args, int64_t sequence, const Vectors& vectors) {
  using C = Accumulator<T>;
  using V = Vector<C>;
  Steps steps = steps_of(args.sequences, sequence);
  auto place = [&](const Series& series, int64_t row, int64_t step) {
    return series.data ? const_cast<T*>(at<T>(series, row, step, 0)) : nullptr;
  };
  V through[kP][N];  // lambda of the step after
  int64_t t = args.reverse ? steps.begin : steps.end - 1, back = args.reverse ? 1 : -1;
  auto take = [&]<bool kLast>(const T* a, bool is_first) {  // a: of the step after
    const T* d_h = place(args.d_h, steps.row, t);
    const T* before = is_first ? place(args.h0, sequence, 0) : place(args.h, steps.row, t + back);
    int64_t before_part = is_first ? args.h0.part : args.h.part;
    T *d_a = place(args.d_a, steps.row, t), *d_b = place(args.d_b, steps.row, t);
    vectors([&](int64_t channel, int n, auto lanes) {
      V lambda[kP];
      for (int j = 0; j < kP; ++j) {
        lambda[j] = lanes.load(d_h + j * args.d_h.part + channel);
        for (int i = 0; i < kP && !kLast; ++i)
          lambda[j] += lanes.load(a + i * args.a.part + j * args.a.column + channel) * through[i][n];
      }
      for (int i = 0; i < kP; ++i) {
        through[i][n] = lambda[i];
        if (d_b) lanes.store(lambda[i], d_b + i * args.d_b.part + channel);
      }
      for (int j = 0; j < kP && d_a; ++j) {
        V state = before ? lanes.load(before + j * before_part + channel) : V{};
        for (int i = 0; i < kP; ++i)
          lanes.store(before ? lambda[i] * state : V{}, d_a + i * args.d_a.part + j * args.d_a.column + channel);
      }
    });
    t += back;
  };
  int64_t count = steps.end - steps.begin;
  if (count > 0) take.template operator()<true>(nullptr, count == 1);
  for (int64_t left = count - 1; left > 0; --left)
    take.template operator()<false>(place(args.a, steps.row, t - back), left == 1);

  if (T* d_h0 = place(args.d_h0, sequence, 0))
    vectors([&](int64_t channel, int n, auto lanes) {
      const T* a = count > 0 ? place(args.a, steps.row, t - back) : nullptr;
      for (int j = 0; j < kP; ++j) {
        V sum{};
        for (int i = 0; i < kP && a; ++i)
          sum += lanes.load(a + i * args.a.part + j * args.a.column + channel) * through[i][n];
        lanes.store(sum, d_h0 + j * args.d_h0.part + channel);
      }
    });
}

template <typename T, int kP> void run_all(const LinearRecurrenceBackwardArgs& args, int64_t sequence, Range channels) {
  with_vectors<Accumulator<T>>(channels, !args.reverse, [&](auto most, const auto& vectors) {
    run<T, kP, decltype(most)::value>(args, sequence, vectors);
  });
}

}  // namespace

void linear_recurrence_backward(const LinearRecurrenceBackwardArgs& args, int64_t sequence, Range channels) {
  with_type(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    args.pairs ? run_all<T, 2>(args, sequence, channels) : run_all<T, 1>(args, sequence, channels);
  });
}

}  // namespace fastsparse::FASTSPARSE_ISA
