#include "cpu/matching_pursuit_step.h"

#include <cmath>
#include <limits>

#include "cpu/candidates.h"
#include "cpu/pursuit.h"

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
  C key(C product, int64_t m) const { return key_of(product, m, args.atoms.norms(), args.nonnegative); }
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
      atoms.inverse[m] = inverse;
      static_cast<C*>(atoms.scale)[m] = C(inverse > most ? most : inverse);
    }
  });
}

void matching_pursuit_step_lengths(const PursuitArgs& args, double* lengths, int64_t row_begin, int64_t row_end) {
  with_type(args.atoms.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr double least = 1e-140;  // below it squares underflow
    for (int64_t i = row_begin; i < row_end; ++i) {
      const auto* row = Problem<T>{args}.residual(i);
      double length = std::sqrt(squared_norm(row, args.atoms.D)) * KeyError<Accumulator<T>>::safety;
      for (int64_t d = 0; length < least && d < args.atoms.D; ++d)
        if (row[d] != 0) length = least;
      lengths[i] = length;
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
      double key = problem.key(scores[j], m);
      if (best[j].atom < 0 || beats(key, best[j].key)) best[j] = {key, m};
      open |= best[j].key == best[j].key;
    }
    if (!open) return;  // nothing is larger than NaN
  }
}

}  // namespace

void matching_pursuit_step_search(const PursuitArgs& args, int64_t rows, int64_t grain, Best* best, int64_t atom_begin,
                                  int64_t atom_end) {
  best += atom_begin / grain * rows;
  with_type(args.atoms.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) search_rows<4, T>(args, i, atom_begin, atom_end, best + i);
    for (; i < rows; ++i) search_rows<1, T>(args, i, atom_begin, atom_end, best + i);
  });
}

// ---- sift: by the scores of a product ----

namespace {

template <typename C> void drop_ruled_out(List<C>& list) {
  int32_t left = 0;
  for (int32_t c = 0; c < list.count; ++c) {
    if (list.first[c] < list.threshold) continue;
    list.first[left] = list.first[c];
    list.latent[left++] = list.latent[c];
  }
  list.count = left;
}

template <typename C>
void sift_row(const PursuitArgs& args, double length, const AtomSizes& sizes, const Candidates& candidates,
              const Stripe& stripe, int64_t i) {
  constexpr int lanes = kLanes<C>;
  List<C> list(candidates, i);
  if (list.count == kHopeless) return;
  KeyError<C> error(args.atoms.D, sizes);
  // Of the score's key and of the exact one; all that is finite in the products of a row of zeros is 0.
  double apart = length == 0 ? 0 : 2.2 * 2 * KeyError<C>::safety * error.of_product(length);
  const C* scores = static_cast<const C*>(stripe.scores) + i * stripe.count;
  const C* scale = static_cast<const C*>(stripe.scale);
  bool decided = error.tame(length);
  for (int64_t v = 0; decided && v < stripe.count; v += lanes) {
    Vector<C> key = load_up_to(scores + v, stripe.count - v);
    if (scale) key *= load(scale + v);
    if (!args.nonnegative) key = absolute(key);
    uint32_t passing = not_at_most(key, broadcast(list.threshold)) & lanes_left(stripe.count - v, lanes);
    if (__builtin_expect(passing == 0, 1)) continue;
    list.append(key, key, stripe.begin + v, passing);
    for (; passing; passing &= passing - 1) {
      double one = key[__builtin_ctz(passing)];
      decided &= std::fabs(one) <= double(std::numeric_limits<C>::max());
      if (C bound = C(one - apart); bound > list.threshold) list.threshold = bound;
    }
    if (list.count <= candidates.capacity) continue;
    drop_ruled_out(list);
    decided &= list.count <= candidates.capacity / 4 * 3;
  }
  if (!decided) list.count = kHopeless;
}

}  // namespace

void matching_pursuit_step_sift(const PursuitArgs& args, const double* lengths, const AtomSizes& sizes,
                                const Candidates& candidates, const Stripe& stripe, int64_t row_begin,
                                int64_t row_end) {
  for (int64_t i = row_begin; i < row_end; ++i)
    if (candidates.dtype == DType::f64) sift_row<double>(args, lengths[i], sizes, candidates, stripe, i);
    else sift_row<float>(args, lengths[i], sizes, candidates, stripe, i);
}

// ---- choose: among candidates ----

namespace {

template <typename T> int64_t choose(const Problem<T>& problem, List<Accumulator<T>>& list, int64_t i) {
  using C = Accumulator<T>;
  drop_ruled_out(list);
  if (list.count <= 1) return list.count == 1 ? list.latent[0] : kHopeless;
  Best best{0, -1};
  int32_t c = 0;
  auto score = [&]<int Count>() {
    for (; c + Count <= list.count; c += Count) {
      const T* atoms[Count];
      for (int j = 0; j < Count; ++j) atoms[j] = problem.atom(list.latent[c + j]);
      C products[Count];
      dots<Count>(problem.residual(i), atoms, problem.args.atoms.D, products);
      for (int j = 0; j < Count; ++j) {
        double key = problem.key(products[j], list.latent[c + j]);
        if (best.atom < 0 || beats(key, best.key)) best = {key, list.latent[c + j]};
      }
    }
  };
  score.template operator()<4>();
  score.template operator()<1>();
  return best.atom;
}

}  // namespace

void matching_pursuit_step_choose(const PursuitArgs& args, const Candidates& candidates, int64_t* chosen,
                                  int64_t row_begin, int64_t row_end) {
  with_type(args.atoms.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t i = row_begin; i < row_end; ++i) {
      List<Accumulator<T>> list(candidates, i);
      chosen[i] = list.count == kHopeless ? kHopeless : choose(Problem<T>{args}, list, i);
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
      value = m < 0 ? C(0) : coefficient_of(score[0], m, args.atoms.norms());
      if (m < 0 || value == 0 || (args.nonnegative && value <= 0)) {
        value = 0;
        indices[i] = 0;
        continue;
      }
      subtract(row, value, problem.atom(m), D);
    }
  });
}

}  // namespace fastsparse::FASTSPARSE_ISA
