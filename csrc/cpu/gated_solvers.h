// Newton's method and multiple shooting for one sequence and a few of its channels (fastsparse/reference/_solvers.py).
// Lanes are chunks of time, which run side by side.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu/gated_recurrence.h"
#include "solvers.h"

namespace fastsparse::FASTSPARSE_ISA {

template <typename C, int K> FASTSPARSE_INLINE Pack<C, K> load_pack(const C* row) {
  return Pack<C, K>::of([&](int k) __attribute__((always_inline)) { return load(row + k * kLanes<C>); });
}

template <typename C, int K> FASTSPARSE_INLINE void store_pack(const Pack<C, K>& value, C* row) {
  Pack<C, K>::each([&](int k) __attribute__((always_inline)) { store(value.v[k], row + k * kLanes<C>); });
}

// matrix * columns, in place of the columns: of order 1 or 2.
template <int kStates, int kColumns, typename V>
FASTSPARSE_INLINE void multiply(const V (&matrix)[kStates * kStates], V (&columns)[kStates * kColumns]) {
  if constexpr (kStates == 1) {
    columns[0] = matrix[0] * columns[0];
  } else {
#pragma GCC unroll 2
    for (int j = 0; j < kColumns; ++j) {
      V first = columns[j], second = columns[kColumns + j];
      columns[j] = matrix[0] * first + matrix[1] * second;
      columns[kColumns + j] = matrix[2] * first + matrix[3] * second;
    }
  }
}

// One sequence's channels [channels.begin, channels.end), no more than the plan's, cut in chunks. Lane j n + i of a row
// is chunk j of the i-th of n channels; lanes behind the last chunk are idle, and so is the time behind the last step.
template <template <typename> class Cell, typename C> class InTime {
  using Math = Activations<C, kTogether>;
  using V = typename Math::V;
  static constexpr int kStates = Cell<Math>::kStates, kWeights = Cell<Math>::kWeights, kSquare = kStates * kStates;
  static constexpr int kErrors = kCovariance<kStates>;
  static constexpr int64_t kRow = kRowBytes / sizeof(C), kGroup = kTogether * kLanes<C>;

 public:
  InTime(const GatedRecurrenceArgs& args, int64_t sequence, Range channels, void* scratch)
      : args_(args), steps_(steps_of(args.sequences, sequence)), channels_(channels),
        n_(channels.end - channels.begin), plan_(time_plan(steps_.end - steps_.begin, kRow, n_)),
        free_(static_cast<C*>(scratch)), passes_(args.passes + sequence * args.H + channels.begin) {
    u_ = rows(3 * kTileSteps), weights_ = rows(kWeights), first_ = rows(kStates), todo_ = rows(1);
    P_ = rows(kSquare), errors_ = rows(kErrors), most_ = rows(1), widest_ = rows(1);
    for (int64_t i = 0; i < n_; ++i) {
      int64_t h = channels.begin + i;
      passes_[i] = kUntried;
      for (int k = 0; k < kStates; ++k)
        if (args.start[k].data)
          with_storage([&]<typename T>() { first_[k * kRow + i] = to_float(*at<T>(args.start[k], sequence, 0, h)); });
      for (int64_t j = 0; j < plan_.chunks; ++j) {
        for (int k = 0; k < kWeights; ++k)
          weights_[k * kRow + j * n_ + i] = static_cast<const C*>(args.weights)[k * args.H + h];
        todo_[j * n_ + i] = 1;
      }
    }
  }

  // Guesses the chunks' starts, runs them, carrying derivatives, and corrects the starts by what chunks' ends miss.
  void shoot() {
    C *start = rows(kStates), *state = rows(kStates), *D = rows(kStates), *out = rows(kStates * kTileSteps);
    guess(start);
    uint64_t once_more = 0;  // channels, of at most kRow, that are certified but for a last run
    for (int attempt = 1; attempt <= kShootingPasses && untried(); ++attempt) {
      // From guesses nothing comes out that is small, so that rounding errors needn't be followed yet.
      bool guessed = attempt == 1 && plan_.chunks > 1;
      std::memcpy(state, start, kStates * kRowBytes);
      begin_tangents();
      for (int64_t t = 0; t < plan_.length; t += kTileSteps) {
        int64_t count = pack(t, kTileSteps, u_);
        for (int64_t g = 0; g < kRow; g += kGroup)
          if (guessed) run_tile<false>(g, count, state, out);
          else run_tile<true>(g, count, state, out);
        unpack(out, t, count);
      }
      for (int64_t i = 0; i < n_; ++i) {
        if (passes_[i] != kUntried) continue;
        corrections(i, D, [&](int64_t lane, int k) { return state[k * kRow + lane - n_] - start[k * kRow + lane]; });
        bool sure = !guessed && steady(i), done = true, lost = false;
        for (int64_t lane = i; lane < plan_.chunks * n_; lane += n_) {
          C d = 0;
          for (int k = 0; k < kStates; ++k) d += magnitude(D[k * kRow + lane]);
          C off = std::sqrt(most_[lane]) * d;  // at most, of every state of the chunk
          sure &= d <= kSmall<C> && off <= kSmall<C>, done &= d <= kNegligible<C> && off <= kNegligible<C>;
          lost |= d != d;
        }
        done |= once_more >> i & 1;
        settle(i, attempt, sure && (done || attempt == kShootingPasses), lost);
        once_more = (once_more & ~(uint64_t{1} << i)) | uint64_t(sure) << i;
        if (passes_[i] == kUntried)
          for (int64_t lane = i; lane < plan_.chunks * n_; lane += n_)
            for (int k = 0; k < kStates; ++k) start[k * kRow + lane] += D[k * kRow + lane];
      }
    }
    give_up();
  }

  // Guesses all states, and corrects them by the linear recurrence that their corrections follow to first order.
  void newton() {
    int64_t L = plan_.length;
    C *h = rows(kStates * L), *q = rows(kStates * L), *P = rows(kSquare * L);  // step by step, [t][state][lane]
    C *before = rows(kStates), *last_q = rows(kStates), *D = rows(kStates), *bad = rows(1);
    std::memcpy(before, first_, kStates * kRowBytes);
    for (int64_t t = 0; t < L; t += kTileSteps) {
      int64_t count = pack(t, kTileSteps, u_);
      for (int64_t g = 0; g < kRow; g += kGroup) first_states(g, t, count, before, h);
    }
    uint64_t near = 0;  // channels, of at most kRow, whose last corrections were so little that the next may be small
    for (int attempt = 1; attempt <= kNewtonPasses && untried(); ++attempt) {
      if (attempt == kNewtonPasses) near = ~uint64_t{0};
      for (int k = 0; k < kStates; ++k)
        for (int64_t lane = n_; lane < plan_.chunks * n_; ++lane)
          before[k * kRow + lane] = h[((L - 1) * kStates + k) * kRow + lane - n_];
      std::memset(static_cast<void*>(last_q), 0, kStates * kRowBytes);
      begin_tangents();
      std::memset(static_cast<void*>(bad), 0, kRowBytes);
      C* state = D;  // borrowed until corrections are known
      std::memcpy(state, before, kStates * kRowBytes);
      for (int64_t t = 0; t < L; t += kTileSteps) {
        int64_t count = pack(t, kTileSteps, u_);
        for (int64_t g = 0; g < kRow; g += kGroup)
          if (near) linearise<true>(g, t, count, state, h, q, P, last_q);
          else linearise<false>(g, t, count, state, h, q, P, last_q);
      }
      for (int64_t i = 0; i < n_; ++i)
        corrections(i, D, [&](int64_t lane, int k) { return last_q[k * kRow + lane - n_]; });
      correct(h, q, P, D, bad);
      for (int64_t i = 0; i < n_; ++i) {
        if (passes_[i] != kUntried) continue;
        C worst = 0;
        bool lost = false;
        for (int64_t lane = i; lane < plan_.chunks * n_; lane += n_) {
          worst = bad[lane] <= worst ? worst : bad[lane];
          for (int k = 0; k < kStates; ++k) lost |= D[k * kRow + lane] != D[k * kRow + lane];
        }
        bool was_near = near >> i & 1;
        settle(i, attempt, was_near && worst == kIsSmall && steady(i), lost);
        near = (near & ~(uint64_t{1} << i)) | uint64_t(worst < kIsFar) << i;
      }
    }
    give_up();
    for (int64_t t = 0; t < L; t += kTileSteps) {
      int64_t count = L - t < kTileSteps ? L - t : kTileSteps;
      unpack(h + t * kStates * kRow, t, count);
    }
  }

 private:
  static constexpr int32_t kUntried = -2;
  // How large a channel's corrections are in Newton's method. From one pass to the next they are about squared, so that
  // small ones mostly come after near ones, which kNear says; only then are rounding errors worth following.
  static constexpr C kIsSmall = 0, kIsNear = 1, kIsFar = 2, kNear = sizeof(C) == 8 ? 0x1p27 : 0x1p12;

  // Calls f.operator()<T>(): only what reads and writes tensors knows how numbers are stored.
  template <typename F> void with_storage(const F& f) const {
    with_type(args_.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      if constexpr (std::is_same_v<Accumulator<T>, C>) f.template operator()<T>();
    });
  }

  static C magnitude(C value) { return value < 0 ? -value : value; }

  C* rows(int64_t count) {
    C* result = free_;
    free_ += count * kRow;
    std::memset(static_cast<void*>(result), 0, count * kRowBytes);
    return result;
  }

  bool untried() const {
    for (int64_t i = 0; i < n_; ++i)
      if (passes_[i] == kUntried) return true;
    return false;
  }
  // What is lost, being NaN, stays so.
  void settle(int64_t channel, int attempt, bool sure, bool lost) {
    if (!sure && !lost) return;
    passes_[channel] = sure ? attempt : kGivenUp;
    for (int64_t j = 0; j < plan_.chunks; ++j) todo_[j * n_ + channel] = 0;
  }
  void give_up() {
    for (int64_t i = 0; i < n_; ++i)
      if (passes_[i] == kUntried) passes_[i] = kGivenUp;
  }

  // Of every chunk: nothing yet but a start.
  void begin_tangents() const {
    for (int i = 0; i < kSquare; ++i)
      for (int64_t lane = 0; lane < kRow; ++lane) P_[i * kRow + lane] = i % (kStates + 1) == 0;
    std::memset(static_cast<void*>(errors_), 0, kErrors * kRowBytes);
    std::memset(static_cast<void*>(most_), 0, kRowBytes);
    std::memset(static_cast<void*>(widest_), 0, kRowBytes);
  }

  // u at steps [t, t + count) of every chunk, as rows [step][gate]; 0 behind the last step. Returns how many there are.
  int64_t pack(int64_t t, int64_t count, C* to) const {
    if (count > plan_.length - t) count = plan_.length - t;
    with_storage([&]<typename T>() { pack_from<T>(t, count, to); });
    return count;
  }
  template <typename T> void pack_from(int64_t t, int64_t count, C* to) const {
    int64_t steps = steps_.end - steps_.begin;
    for (int64_t j = 0; j < plan_.chunks; ++j) {
      int64_t first = j * plan_.length + t, inside = steps - first < count ? steps - first : count;
      for (int64_t i = 0; i < n_; ++i) {
        C* row = to + j * n_ + i;
        const T* from = at<T>(args_.u, steps_.row, steps_.begin + first, channels_.begin + i);
        for (int64_t s = 0; s < inside; ++s, row += 3 * kRow, from += args_.u.step)
          for (int g = 0; g < 3; ++g) row[g * kRow] = to_float(from[g * args_.u.part]);
        for (int64_t s = inside < 0 ? 0 : inside; s < count; ++s, row += 3 * kRow)
          for (int g = 0; g < 3; ++g) row[g * kRow] = 0;
      }
    }
  }

  // The other way, of states, as rows [step][state].
  void unpack(const C* from, int64_t t, int64_t count) const {
    with_storage([&]<typename T>() {
      for (int k = 0; k < kStates; ++k) unpack_to<T>(args_.states[k], from + k * kRow, t, count);
    });
  }
  template <typename T> void unpack_to(const Series& states, const C* from, int64_t t, int64_t count) const {
    int64_t steps = steps_.end - steps_.begin;
    for (int64_t j = 0; j < plan_.chunks; ++j) {
      int64_t first = j * plan_.length + t, inside = steps - first < count ? steps - first : count;
      for (int64_t i = 0; i < n_; ++i) {
        const C* row = from + j * n_ + i;
        T* to = const_cast<T*>(at<T>(states, steps_.row, steps_.begin + first, channels_.begin + i));
        for (int64_t s = 0; s < inside; ++s, row += kStates * kRow, to += states.step) from_float(*row, *to);
      }
    }
  }

  Cell<Math> cell(int64_t group) const {
    Cell<Math> result;
    for (int i = 0; i < kWeights; ++i) result.w[i] = load_pack<C, kTogether>(weights_ + i * kRow + group);
    return result;
  }
  template <int Count> static FASTSPARSE_INLINE void load_rows(V (&to)[Count], const C* from, int64_t group) {
#pragma GCC unroll 4
    for (int i = 0; i < Count; ++i) to[i] = load_pack<C, kTogether>(from + i * kRow + group);
  }
  template <int Count> static FASTSPARSE_INLINE void store_rows(const V (&from)[Count], C* to, int64_t group) {
#pragma GCC unroll 4
    for (int i = 0; i < Count; ++i) store_pack(from[i], to + i * kRow + group);
  }

  // A chunk starts from what the last step before it makes of nothing.
  void guess(C* start) {
    std::memcpy(start, first_, kStates * kRowBytes);
    pack(plan_.length - 1, 1, u_);
    for (int64_t g = 0; g < kRow; g += kGroup) {
      V now[3], state[kStates];
      load_rows(now, u_, g);
      for (V& part : state) part = V(C(0));
      cell(g).step(now, state);
      store_rows(state, u_, g);
    }
    for (int k = 0; k < kStates; ++k)
      for (int64_t lane = n_; lane < plan_.chunks * n_; ++lane) start[k * kRow + lane] = u_[k * kRow + lane - n_];
  }

  // 0 for derivatives so little that arithmetic with them is slow. (Corrections may be as little, and grow again.)
  template <int Count> static FASTSPARSE_INLINE void flush(V (&values)[Count]) {
    constexpr C least = std::numeric_limits<C>::min();
#pragma GCC unroll 4
    for (V& value : values)
      value = V::of([&](int k) __attribute__((always_inline)) {
        return absolute(value.v[k]) < least ? Vector<C>{} : value.v[k];  // NaN remains
      });
  }

  // What chunks carry along: the derivative P of their states in their starts; kMostToo, how large |P|^2, the sum of its
  // squared entries, has been; kErrorsToo, the covariance of the rounding errors made since, and how large the variance.
  template <bool kErrorsToo, bool kMostToo> struct Tangents {
    static constexpr C kTiny = sizeof(C) == 8 ? 0x1p-511 : 0x1p-63;  // whose square is just a normal number

    V P[kSquare], errors[kErrors], most[1], widest[1];

    FASTSPARSE_INLINE void step(const V (&J)[kSquare]) {
      multiply<kStates, kStates>(J, P), flush(P);
      if constexpr (!kMostToo) return;
      most[0] = V::of([&](int k) __attribute__((always_inline)) {
        Vector<C> size{};
#pragma GCC unroll 4
        for (int i = 0; i < kSquare; ++i) {
          Vector<C> entry = absolute(P[i].v[k]);
          entry = entry < kTiny ? broadcast(kTiny) : entry;
          size += entry * entry;
        }
        return size <= most[0].v[k] ? most[0].v[k] : size;  // NaN comes through
      });
      if constexpr (!kErrorsToo) return;
      carry_errors<kStates>(J, errors), add_errors<kStates>(errors);
      V variance = trace<kStates>(errors);
      widest[0] = V::of([&](int k) __attribute__((always_inline)) {
        return variance.v[k] <= widest[0].v[k] ? widest[0].v[k] : variance.v[k];
      });
    }
  };
  template <bool kErrorsToo, bool kMostToo = kErrorsToo>
  FASTSPARSE_INLINE Tangents<kErrorsToo, kMostToo> tangents(int64_t group) const {
    Tangents<kErrorsToo, kMostToo> result;
    load_rows(result.P, P_, group);
    if constexpr (kMostToo) load_rows(result.most, most_, group);
    if constexpr (kErrorsToo) load_rows(result.errors, errors_, group), load_rows(result.widest, widest_, group);
    return result;
  }
  template <bool kErrorsToo, bool kMostToo>
  FASTSPARSE_INLINE void keep(const Tangents<kErrorsToo, kMostToo>& tangents, int64_t group) const {
    store_rows(tangents.P, P_, group);
    if constexpr (kMostToo) store_rows(tangents.most, most_, group);
    if constexpr (kErrorsToo) store_rows(tangents.errors, errors_, group), store_rows(tangents.widest, widest_, group);
  }

  // `count` steps of the chunks of a group, as u_ has them: `state` goes on, and `out` gets every state.
  template <bool kErrorsToo> void run_tile(int64_t group, int64_t count, C* state, C* out) const {
    Cell<Math> cell = this->cell(group);
    auto tangents = this->tangents<kErrorsToo, true>(group);
    V now[3], h[kStates], J[kSquare];
    load_rows(h, state, group);
    for (int64_t s = 0; s < count; ++s) {
      load_rows(now, u_ + s * 3 * kRow, group);
      cell.step(now, h, J);
      tangents.step(J);
#pragma GCC unroll 2
      for (int k = 0; k < kStates; ++k) store_pack(h[k], out + (s * kStates + k) * kRow + group);
    }
    store_rows(h, state, group), keep(tangents, group);
  }

  // Whether rounding errors of a channel spread but little, beside 1 or what it starts from.
  bool steady(int64_t channel) const {
    C unit = magnitude(first_[channel]), errors[kErrors] = {}, P[kSquare];  // errors: of a chunk's start
    if (unit <= 1) unit = 1;
    bool within = true;
    for (int64_t lane = channel; lane < plan_.chunks * n_; lane += n_) {
      C variance = most_[lane] * trace<kStates>(errors) + widest_[lane];
      within &= unit * unit * variance <= C(kMostSpread);  // NaN is not
      for (int i = 0; i < kSquare; ++i) P[i] = P_[i * kRow + lane];
      carry_errors<kStates>(P, errors);
      for (int i = 0; i < kErrors; ++i) errors[i] += errors_[i * kRow + lane];
    }
    return within;
  }

  // D[j] = P[j - 1] D[j - 1] + missed(j) for a channel's chunks j, D[0] being 0.
  template <typename Missed> void corrections(int64_t channel, C* D, const Missed& missed) const {
    for (int k = 0; k < kStates; ++k) D[k * kRow + channel] = 0;
    for (int64_t lane = channel + n_; lane < plan_.chunks * n_; lane += n_)
      for (int i = 0; i < kStates; ++i) {
        C d = missed(lane, i);
        for (int j = 0; j < kStates; ++j) d += P_[(i * kStates + j) * kRow + lane - n_] * D[j * kRow + lane - n_];
        D[i * kRow + lane] = d;
      }
  }

  // h: what a step makes of nothing, of the first state where it is the first.
  void first_states(int64_t group, int64_t t, int64_t count, const C* before, C* h) const {
    Cell<Math> cell = this->cell(group);
    for (int64_t s = 0; s < count; ++s) {
      V now[3], state[kStates];
      load_rows(now, u_ + s * 3 * kRow, group);
      for (V& part : state) part = V(C(0));
      if (t + s == 0) load_rows(state, before, group);
      cell.step(now, state);
      store_rows(state, h + (t + s) * kStates * kRow, group);
    }
  }

  // With J and F those of step s at the states h: q = J q + F and P = J P, both kept; `before` is the state before.
  template <bool kErrorsToo>
  void linearise(int64_t group, int64_t t, int64_t count, C* before, const C* h, C* q, C* P, C* last_q) const {
    Cell<Math> cell = this->cell(group);
    auto tangents = this->tangents<kErrorsToo>(group);
    V now[3], state[kStates], old[kStates], J[kSquare], offset[kStates];
    load_rows(old, before, group), load_rows(offset, last_q, group);
    for (int64_t s = 0; s < count; ++s) {
      load_rows(now, u_ + s * 3 * kRow, group);
      for (int k = 0; k < kStates; ++k) state[k] = old[k];
      cell.step(now, state, J);
      load_rows(old, h + (t + s) * kStates * kRow, group);
      multiply<kStates, 1>(J, offset);
      for (int k = 0; k < kStates; ++k) offset[k] += state[k] - old[k];
      tangents.step(J);
      store_rows(offset, q + (t + s) * kStates * kRow, group);
      store_rows(tangents.P, P + (t + s) * kSquare * kRow, group);
    }
    store_rows(old, before, group), store_rows(offset, last_q, group), keep(tangents, group);
  }

  // h += d = q + P D in the channels that are left; bad becomes kIsNear or kIsFar where a d isn't small.
  void correct(C* h, const C* q, const C* P, const C* D, C* bad) const {
    int64_t length = steps_.end - steps_.begin - (plan_.chunks - 1) * plan_.length;  // of the last chunk
    Vector<C> one = broadcast(C(1)), is_near = broadcast(kIsNear), is_far = broadcast(kIsFar);
    for (int64_t t = 0; t < plan_.length; ++t) {
      int64_t inside = (t < length ? plan_.chunks : plan_.chunks - 1) * n_;
      for (int64_t lane = 0; lane < inside; lane += kLanes<C>)
        for (int i = 0; i < kStates; ++i) {
          Vector<C> d = load(q + (t * kStates + i) * kRow + lane);
          for (int j = 0; j < kStates; ++j)
            d += load(P + (t * kSquare + i * kStates + j) * kRow + lane) * load(D + j * kRow + lane);
          C* to = h + (t * kStates + i) * kRow + lane;
          Vector<C> old = load(to), now = old + d;
          store(load(todo_ + lane) > 0 ? now : old, to);
          Vector<C> limit = kSmall<C> * at_least(absolute(old), one);  // of the new state an infinite d is a small part
          Vector<C> worst = load(bad + lane);
          worst = absolute(d) <= limit ? worst : at_least(worst, is_near);
          store(absolute(d) <= kNear * limit ? worst : is_far, bad + lane);  // NaN is far
        }
    }
  }

  const GatedRecurrenceArgs& args_;
  Steps steps_;
  Range channels_;
  int64_t n_;
  TimePlan plan_;
  C* free_;
  int32_t* passes_;
  C *u_, *weights_, *first_, *todo_;
  C *P_, *errors_, *most_, *widest_;  // of chunks, at their ends (Tangents)
};

}  // namespace fastsparse::FASTSPARSE_ISA
