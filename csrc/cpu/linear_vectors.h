// How channels of a linear recurrence go along together, step by step: the vectors that they are.
#pragma once

#include "cpu/lanes.h"
#include "cpu/linear_recurrence.h"

namespace fastsparse::FASTSPARSE_ISA {

// for_vectors from the last one down to the first.
template <typename C, typename F> inline void for_vectors_down(Range channels, const F& f) {
  int64_t rest = (channels.end - channels.begin) % kLanes<C>, h = channels.end - rest;
  if (rest) f(h, FirstLanes{int(rest)});
  for (; h > channels.begin; h -= kLanes<C>) f(h - kLanes<C>, AllLanes{});
}

template <int n> struct Most { static constexpr int value = n; };

// Calls f(Most<N>, vectors), for no more than N vectors of C; vectors(g) calls g(channel, n, lanes) for all of them, the
// n-th one, and is to be called for every step. One vector's states are for registers, those of many for the cache.
template <typename C, typename F> inline void with_vectors(Range channels, bool down, const F& f) {
  constexpr int lanes = kLanes<C>;
  if (channels.end - channels.begin <= lanes)
    for_vectors<C>(channels, [&](int64_t channel, auto these) {
      f(Most<1>{}, [&](const auto& g) { g(channel, 0, these); });
    });
  else
    f(Most<int(kLinearChannels) / lanes>{}, [&](const auto& g) {
      auto numbered = [&](int64_t channel, auto these) { g(channel, int(channel - channels.begin) / lanes, these); };
      down ? for_vectors_down<C>(channels, numbered) : for_vectors<C>(channels, numbered);
    });
}

}  // namespace fastsparse::FASTSPARSE_ISA
