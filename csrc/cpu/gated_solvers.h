// Newton's method and multiple shooting for one sequence and a few of its channels (fastsparse/reference/_solvers.py).
// Lanes are chunks of time, which run side by side.
#pragma once

#include <limits>

#include "cpu/gated_recurrence.h"
#include "solvers.h"

namespace fastsparse::FASTSPARSE_ISA {

template <typename C, int K> FASTSPARSE_INLINE Pack<C, K> load_pack(const C* row) {
  Pack<C, K> result;
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) result.v[k] = load(row + k * kLanes<C>);
  return result;
}

template <typename C, int K> FASTSPARSE_INLINE void store_pack(const Pack<C, K>& value, C* row) {
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) store(value.v[k], row + k * kLanes<C>);
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
template <template <typename> class Cell, typename T> class InTime {
  using C = Accumulator<T>;
  using Math = Activations<C, kTogether>;
  using V = typename Math::V;
  static constexpr int kStates = Cell<Math>::kStates, kWeights = Cell<Math>::kWeights, kSquare = kStates * kStates;
  static constexpr int64_t kRow = kRowBytes / sizeof(C), kGroup = kTogether * kLanes<C>;

 public:
  InTime(const GatedRecurrenceArgs& args, int64_t sequence, Range channels, void* scratch)
      : args_(args), steps_(steps_of(args.sequences, sequence)), channels_(channels),
        n_(channels.end - channels.begin), plan_(time_plan(steps_.end - steps_.begin, kRow, n_)),
        free_(static_cast<C*>(scratch)), passes_(args.passes + sequence * args.H + channels.begin) {
    u_ = rows(3 * kTileSteps), weights_ = rows(kWeights), first_ = rows(kStates), todo_ = rows(1);
    for (int64_t i = 0; i < n_; ++i) {
      int64_t h = channels.begin + i;
      passes_[i] = kUntried;
      for (int k = 0; k < kStates; ++k)
        if (args.start[k].data) first_[k * kRow + i] = to_float(*at<T>(args.start[k], sequence, 0, h));
      for (int64_t j = 0; j < plan_.chunks; ++j) {
        for (int k = 0; k < kWeights; ++k)
          weights_[k * kRow + j * n_ + i] = static_cast<const C*>(args.weights)[k * args.H + h];
        todo_[j * n_ + i] = 1;
      }
    }
  }

  // Guesses the chunks' starts, runs them, carrying derivatives, and corrects the starts by what chunks' ends miss.
  void shoot() {
    C *start = rows(kStates), *state = rows(kStates), *P = rows(kSquare), *most = rows(kStates);
    C *D = rows(kStates), *out = rows(kStates * kTileSteps);
    guess(start);
    uint64_t once_more = 0;  // channels, of at most kRow, that are certified but for a last run
    for (int attempt = 1; attempt <= kShootingPasses && untried(); ++attempt) {
      std::memcpy(state, start, kStates * kRowBytes);
      set_unity(P);
      std::memset(static_cast<void*>(most), 0, kStates * kRowBytes);
      for (int64_t t = 0; t < plan_.length; t += kTileSteps) {
        int64_t count = pack(t, kTileSteps, u_);
        for (int64_t g = 0; g < kRow; g += kGroup) run_tile(g, count, state, P, most, out);
        for (int k = 0; k < kStates; ++k) unpack(out + k * kTileSteps * kRow, k, t, count);
      }
      for (int64_t i = 0; i < n_; ++i) {
        if (passes_[i] != kUntried) continue;
        bool sure = true, done = true, lost = false;
        if (once_more >> i & 1) {
          settle(i, attempt, sure, lost);
          continue;
        }
        corrections(i, P, D, [&](int64_t lane, int k) { return state[k * kRow + lane - n_] - start[k * kRow + lane]; });
        sure = steady(i, P, most);
        for (int64_t lane = i; lane < plan_.chunks * n_; lane += n_) {
          C off = 0;  // at most, of every state of the chunk
          for (int k = 0; k < kStates; ++k) {
            C d = magnitude(D[k * kRow + lane]);
            off += most[k * kRow + lane] * d;
            sure &= d <= kSmall<C>, done &= d <= kNegligible<C>;
            lost |= d != d;
          }
          sure &= off <= kSmall<C>, done &= off <= kNegligible<C>;
        }
        settle(i, attempt, sure && (done || attempt == kShootingPasses), lost);
        once_more |= uint64_t(sure) << i;
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
    C *before = rows(kStates), *last_q = rows(kStates), *last_P = rows(kSquare), *D = rows(kStates), *bad = rows(1);
    std::memcpy(before, first_, kStates * kRowBytes);
    for (int64_t t = 0; t < L; t += kTileSteps) {
      int64_t count = pack(t, kTileSteps, u_);
      for (int64_t g = 0; g < kRow; g += kGroup) first_states(g, t, count, before, h);
    }
    for (int attempt = 1; attempt <= kNewtonPasses && untried(); ++attempt) {
      for (int k = 0; k < kStates; ++k)
        for (int64_t lane = n_; lane < plan_.chunks * n_; ++lane)
          before[k * kRow + lane] = h[((L - 1) * kStates + k) * kRow + lane - n_];
      std::memset(static_cast<void*>(last_q), 0, kStates * kRowBytes);
      set_unity(last_P);
      std::memset(static_cast<void*>(bad), 0, kRowBytes);
      C* state = D;  // borrowed until corrections are known
      std::memcpy(state, before, kStates * kRowBytes);
      for (int64_t t = 0; t < L; t += kTileSteps) {
        int64_t count = pack(t, kTileSteps, u_);
        for (int64_t g = 0; g < kRow; g += kGroup) linearise(g, t, count, state, h, q, P, last_q, last_P);
      }
      for (int64_t i = 0; i < n_; ++i)
        corrections(i, last_P, D, [&](int64_t lane, int k) { return last_q[k * kRow + lane - n_]; });
      correct(h, q, P, D, bad);
      for (int64_t i = 0; i < n_; ++i) {
        if (passes_[i] != kUntried) continue;
        bool sure = true, lost = false;
        for (int64_t lane = i; lane < plan_.chunks * n_; lane += n_) {
          sure &= bad[lane] == 0;
          for (int k = 0; k < kStates; ++k) lost |= D[k * kRow + lane] != D[k * kRow + lane];
        }
        settle(i, attempt, sure, lost);
      }
    }
    give_up();
    for (int64_t t = 0; t < L; t += kTileSteps) {
      int64_t count = L - t < kTileSteps ? L - t : kTileSteps;
      for (int k = 0; k < kStates; ++k) unpack(h + (t * kStates + k) * kRow, k, t, count, kStates);
    }
  }

 private:
  static constexpr int32_t kUntried = -2;

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

  void set_unity(C* P) const {
    for (int i = 0; i < kSquare; ++i)
      for (int64_t lane = 0; lane < kRow; ++lane) P[i * kRow + lane] = i % (kStates + 1) == 0;
  }

  // u at steps [t, t + count) of every chunk, as rows [step][gate]; 0 behind the last step. Returns how many there are.
  int64_t pack(int64_t t, int64_t count, C* to) const {
    int64_t steps = steps_.end - steps_.begin;
    if (count > plan_.length - t) count = plan_.length - t;
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
    return count;
  }

  // The other way, of one state: rows `apart` one from the next.
  void unpack(const C* from, int state, int64_t t, int64_t count, int64_t apart = 1) const {
    int64_t steps = steps_.end - steps_.begin;
    for (int64_t j = 0; j < plan_.chunks; ++j) {
      int64_t first = j * plan_.length + t, inside = steps - first < count ? steps - first : count;
      for (int64_t i = 0; i < n_; ++i) {
        const C* row = from + j * n_ + i;
        T* to = const_cast<T*>(at<T>(args_.states[state], steps_.row, steps_.begin + first, channels_.begin + i));
        for (int64_t s = 0; s < inside; ++s, row += apart * kRow, to += args_.states[state].step) from_float(*row, *to);
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
#pragma GCC unroll 8
      for (Vector<C>& part : value.v) part = absolute(part) < least ? Vector<C>{} : part;  // NaN remains
  }

  // `count` steps of the chunks of a group, as u_ has them: `state` and its derivative P go on, `most` grows to the
  // largest |P| of a column so far, and `out` gets every state.
  void run_tile(int64_t group, int64_t count, C* state, C* P, C* most, C* out) const {
    Cell<Math> cell = this->cell(group);
    V now[3], h[kStates], J[kSquare], tangent[kSquare], largest[kStates];
    load_rows(h, state, group), load_rows(tangent, P, group), load_rows(largest, most, group);
    for (int64_t s = 0; s < count; ++s) {
      load_rows(now, u_ + s * 3 * kRow, group);
      cell.step(now, h, J);
      multiply<kStates, kStates>(J, tangent), flush(tangent);
#pragma GCC unroll 2
      for (int j = 0; j < kStates; ++j)
#pragma GCC unroll 8
        for (int k = 0; k < kTogether; ++k) {
          Vector<C> size = absolute(tangent[j].v[k]);
          if constexpr (kStates == 2) size += absolute(tangent[2 + j].v[k]);
          largest[j].v[k] = size <= largest[j].v[k] ? largest[j].v[k] : size;  // NaN comes through
        }
#pragma GCC unroll 2
      for (int k = 0; k < kStates; ++k) store_pack(h[k], out + (k * kTileSteps + s) * kRow + group);
    }
    store_rows(h, state, group), store_rows(tangent, P, group), store_rows(largest, most, group);
  }

  // Whether rounding errors of a channel grow but little, from a chunk's start to any later state: `grown` is what the
  // start has of them from the chunks before, the sum of a state's parts, in units of one.
  bool steady(int64_t channel, const C* P, const C* most) const {
    bool within = true;
    C grown = 0;
    for (int64_t lane = channel; lane < plan_.chunks * n_; lane += n_) {
      C largest = 0, of_end = 0;  // of P's columns
      for (int j = 0; j < kStates; ++j) {
        C column = 0;
        for (int i = 0; i < kStates; ++i) column += magnitude(P[(i * kStates + j) * kRow + lane]);
        if (!(column <= of_end)) of_end = column;
        if (!(most[j * kRow + lane] <= largest)) largest = most[j * kRow + lane];
      }
      within &= largest * (grown + 1) <= C(kMostGrowth);  // NaN is not
      grown = of_end * grown + largest;
    }
    return within;
  }

  // D[j] = P[j - 1] D[j - 1] + missed(j) for a channel's chunks j, D[0] being 0.
  template <typename Missed> void corrections(int64_t channel, const C* P, C* D, const Missed& missed) const {
    for (int k = 0; k < kStates; ++k) D[k * kRow + channel] = 0;
    for (int64_t lane = channel + n_; lane < plan_.chunks * n_; lane += n_)
      for (int i = 0; i < kStates; ++i) {
        C d = missed(lane, i);
        for (int j = 0; j < kStates; ++j) d += P[(i * kStates + j) * kRow + lane - n_] * D[j * kRow + lane - n_];
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
  void linearise(int64_t group, int64_t t, int64_t count, C* before, const C* h, C* q, C* P, C* last_q,
                 C* last_P) const {
    Cell<Math> cell = this->cell(group);
    V now[3], state[kStates], old[kStates], J[kSquare], offset[kStates], tangent[kSquare];
    load_rows(old, before, group), load_rows(offset, last_q, group), load_rows(tangent, last_P, group);
    for (int64_t s = 0; s < count; ++s) {
      load_rows(now, u_ + s * 3 * kRow, group);
      for (int k = 0; k < kStates; ++k) state[k] = old[k];
      cell.step(now, state, J);
      load_rows(old, h + (t + s) * kStates * kRow, group);
      multiply<kStates, 1>(J, offset);
      for (int k = 0; k < kStates; ++k) offset[k] += state[k] - old[k];
      multiply<kStates, kStates>(J, tangent);
      flush(tangent);
      store_rows(offset, q + (t + s) * kStates * kRow, group);
      store_rows(tangent, P + (t + s) * kSquare * kRow, group);
    }
    store_rows(old, before, group), store_rows(offset, last_q, group), store_rows(tangent, last_P, group);
  }

  // h += d = q + P D in the channels that are left; bad becomes 1 where d isn't small.
  void correct(C* h, const C* q, const C* P, const C* D, C* bad) const {
    int64_t length = steps_.end - steps_.begin - (plan_.chunks - 1) * plan_.length;  // of the last chunk
    Vector<C> one = broadcast(C(1));
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
          store(absolute(d) <= limit ? load(bad + lane) : one, bad + lane);
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
};

}  // namespace fastsparse::FASTSPARSE_ISA
