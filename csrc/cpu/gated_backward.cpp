#include "cpu/gated_backward.h"

#include "cpu/activations.h"
#include "cpu/lanes.h"

namespace fastsparse::FASTSPARSE_ISA {

namespace {

constexpr int64_t kSpan = 64;  // steps that are summed up on their own

template <typename T, typename Lanes> inline Pack<Accumulator<T>, 1> load_one(const T* from, Lanes lanes) {
  Pack<Accumulator<T>, 1> result;
  result.v[0] = lanes.load(from);
  return result;
}

// The channels of a vector.
template <template <typename> typename Cell, typename T, typename Lanes>
void run_back(const GatedBackwardArgs& args, int64_t group, Range sequences, int64_t channel, Lanes lanes) {
  using C = Accumulator<T>;
  using V = Pack<C, 1>;
  using ThisCell = Cell<Activations<C, 1>>;
  constexpr int states = ThisCell::kStates, weights = ThisCell::kWeights;
  ThisCell cell;
  for (int i = 0; i < weights; ++i) cell.w[i] = load_one(static_cast<const T*>(args.weights[i]) + channel, lanes);

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
        for (int i = 0; i < 3; ++i) u[i] = load_one(from + i * args.u.part, lanes);
        for (int i = 0; i < states; ++i) {
          const T* state = t > steps.begin ? at<T>(args.states[i], steps.row, t - 1, channel)
                                           : at<T>(args.start[i], s, 0, channel);
          before[i] = load_one(state, lanes);
          through[i] += load_one(at<T>(args.d_states[i], steps.row, t, channel), lanes);
        }
        cell.back(u, before, through, d_u, part);
        if (args.d_u) {
          T* to = static_cast<T*>(args.d_u) + (steps.row * args.sequences.T + t) * 3 * args.H + channel;
          for (int i = 0; i < 3; ++i) lanes.store(d_u[i].v[0], to + i * args.H);
        }
      }
      for (int i = 0; i < weights; ++i) sums[i] += part[i];
      end = begin;
    }
    for (int i = 0; i < states; ++i)
      if (args.d_start[i]) lanes.store(through[i].v[0], static_cast<T*>(args.d_start[i]) + s * args.H + channel);
  }
  if (args.d_weights)
    for (int i = 0; i < weights; ++i)
      lanes.store(sums[i].v[0], static_cast<C*>(args.d_weights) + (group * weights + i) * args.H + channel);
}

}  // namespace

void gated_backward(const GatedBackwardArgs& args, int64_t group, Range sequences, Range channels) {
  with_cell(args.cell, [&]<template <typename> typename Cell>() {
    with_type(args.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      for_vectors<Accumulator<T>>(channels, [&](int64_t channel, auto lanes) {
        run_back<Cell, T>(args, group, sequences, channel, lanes);
      });
    });
  });
}

}  // namespace fastsparse::FASTSPARSE_ISA
