#include "cpu/matching_pursuit_step.h"

#include <cmath>
#include <limits>

#include "cpu/candidates.h"
#include "cpu/dot.h"

namespace fastsparse::FASTSPARSE_ISA {

namespace {

// The dictionary and the residuals in their types.
template <typename T> struct Problem {
  using C = Accumulator<T>;
  const PursuitArgs& args;

  const T* atom(int64_t m) const { return static_cast<const T*>(args.atoms.rows) + m * args.atoms.stride; }
  C* residual(int64_t i) const {
    return static_cast<C*>(args.residuals.data) + (args.residuals.rows ? args.residuals.rows[i] : i) * args.atoms.D;
  }
  bool zero(int64_t m) const { return args.atoms.squares && args.atoms.squares[m] == 0; }
  C key(C score, int64_t m) const {
    if (args.atoms.inverse) score *= static_cast<const C*>(args.atoms.inverse)[m];
    return args.nonnegative ? score : std::fabs(score);
  }
};

}  // namespace

void matching_pursuit_step_norms(const Atoms& atoms, int64_t begin, int64_t end) {
  with_type(atoms.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = Accumulator<T>;
    for (int64_t m = begin; m < end; ++m) {
      double square = squared_norm(static_cast<const T*>(atoms.rows) + m * atoms.stride, atoms.D);
      double inverse = square == 0 ? 0 : 1 / std::sqrt(square);
      constexpr double most = std::numeric_limits<C>::max();
      atoms.squares[m] = square;
      static_cast<C*>(atoms.inverse)[m] = C(inverse > most ? most : inverse);
    }
  });
}

void matching_pursuit_step_finite(const PursuitArgs& args, bool* finite, int64_t row_begin, int64_t row_end) {
  with_type(args.atoms.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = Accumulator<T>;
    for (int64_t i = row_begin; i < row_end; ++i) {
      const C* row = Problem<T>{args}.residual(i);
      Vector<C> zeros = {};  // times 0 anything finite is 0
      int64_t d = 0;
      for (; d + kLanes<C> <= args.atoms.D; d += kLanes<C>) zeros += load(row + d) * Vector<C>{};
      C zero = sum<C>(zeros);
      for (; d < args.atoms.D; ++d) zero += row[d] * C(0);
      finite[i] = zero == 0;
    }
  });
}

// ---- search: every atom ----

namespace {

template <int Count, typename T>
void search_rows(const PursuitArgs& args, int64_t i, int64_t atom_begin, int64_t atom_end, Best* best) {
  using C = Accumulator<T>;
  Problem<T> problem{args};
  const C* rows[Count];
  for (int j = 0; j < Count; ++j) {
    rows[j] = problem.residual(i + j);
    best[j] = {0, -1};
  }
  for (int64_t m = atom_begin; m < atom_end; ++m) {
    if (problem.zero(m)) continue;
    C scores[Count];
    dots<Count>(problem.atom(m), rows, args.atoms.D, scores);
    bool open = false;
    for (int j = 0; j < Count; ++j) {
      C key = problem.key(scores[j], m);
      bool best_is_nan = best[j].key != best[j].key;
      if (best[j].atom < 0 || key > C(best[j].key) || (key != key && !best_is_nan)) best[j] = {double(key), m};
      open |= best[j].key == best[j].key;
    }
    if (!open) return;  // nothing is larger than NaN
  }
}

}  // namespace

void matching_pursuit_step_search(const PursuitArgs& args, int64_t rows, int64_t atom_begin, int64_t atom_end,
                                  Best* best) {
  with_type(args.atoms.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) search_rows<4, T>(args, i, atom_begin, atom_end, best + i);
    for (; i < rows; ++i) search_rows<1, T>(args, i, atom_begin, atom_end, best + i);
  });
}

// ---- choose: among candidates ----

namespace {

template <typename T> int64_t choose(const Problem<T>& problem, List<Accumulator<T>>& list, bool exact, int64_t i) {
  using C = Accumulator<T>;
  if (list.count == 1) return list.latent[0];
  if (!exact) {  // the bounds make place for keys
    constexpr int together = 4;
    int32_t c = 0;
    auto score = [&]<int Count>() {
      for (; c + Count <= list.count; c += Count) {
        const T* atoms[Count];
        for (int j = 0; j < Count; ++j) atoms[j] = problem.atom(list.latent[c + j]);
        C scores[Count];
        dots<Count>(problem.residual(i), atoms, problem.args.atoms.D, scores);
        for (int j = 0; j < Count; ++j) list.first[c + j] = problem.key(scores[j], list.latent[c + j]);
      }
    };
    score.template operator()<together>();
    score.template operator()<1>();
  }
  Candidate<C> best{list.first[0], 0, list.latent[0]};
  for (int32_t c = 1; c < list.count; ++c)
    if (Candidate<C> other{list.first[c], 0, list.latent[c]}; Better{}(other, best)) best = other;
  return best.latent;
}

}  // namespace

void matching_pursuit_step_choose(const PursuitArgs& args, const Candidates& candidates, bool exact, int64_t* chosen,
                                  int64_t row_begin, int64_t row_end) {
  with_type(args.atoms.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t i = row_begin; i < row_end; ++i) {
      List<Accumulator<T>> list(candidates, i);
      chosen[i] = list.count == kHopeless ? kHopeless : choose(Problem<T>{args}, list, exact, i);
    }
  });
}

// ---- take ----

void matching_pursuit_step_take(const PursuitArgs& args, void* values, int64_t* indices, int64_t row_begin,
                                int64_t row_end) {
  with_type(args.atoms.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = Accumulator<T>;
    Problem<T> problem{args};
    for (int64_t i = row_begin; i < row_end; ++i) {
      C& value = static_cast<C*>(values)[i];
      int64_t m = indices[i], D = args.atoms.D;
      C* row = problem.residual(i);
      C score[1] = {};
      if (m >= 0) {
        const T* atoms[1] = {problem.atom(m)};
        dots<1>(row, atoms, D, score);
      }
      value = score[0];
      if (m >= 0 && args.atoms.squares) value = problem.zero(m) ? C(0) : C(value / args.atoms.squares[m]);
      if (m < 0 || value == 0 || (args.nonnegative && value <= 0)) {
        value = 0;
        indices[i] = 0;
        continue;
      }
      const T* atom = problem.atom(m);
      int64_t d = 0;
      for (; d + kLanes<C> <= D; d += kLanes<C>) store(load(row + d) - broadcast(value) * load(atom + d), row + d);
      for (; d < D; ++d) row[d] -= value * to_float(atom[d]);
    }
  });
}

}  // namespace fastsparse::FASTSPARSE_ISA
