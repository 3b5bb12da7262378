#include "cpu/matching_pursuit.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "cpu/pursuit.h"

namespace fastsparse::FASTSPARSE_ISA {

// ---- the dictionary ----

void matching_pursuit_prepare(const PrepareArgs& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = Accumulator<T>;
    for (int64_t m = begin; m < end; ++m) {
      const T* row = static_cast<const T*>(args.rows) + m * args.stride;
      std::memcpy(static_cast<T*>(args.copy) + m * args.D, row, args.D * sizeof(T));
      double square = squared_norm(row, args.D), norm = std::sqrt(square);
      args.squares[m] = square;
      args.inverse[m] = square == 0 ? 0 : 1 / norm;
      if (!args.scored) continue;
      C* scored = static_cast<C*>(args.scored) + m * args.D;
      // In fp64: the norm of a tiny or huge atom may be out of fp32's range, its reciprocal too.
      double by = args.normalized ? 1.0 : norm == 0 ? std::numeric_limits<double>::infinity() : norm;
      for (int64_t d = 0; d < args.D; ++d) scored[d] = C(double(to_float(row[d])) / by);
    }
  });
}

namespace {

template <typename C> void spread(const SpreadArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t side = 16;
  const C* stripe = static_cast<const C*>(args.stripe);
  C* gram = static_cast<C*>(args.gram);
  int64_t width = args.M - args.begin;
  for (int64_t i = 0; i < args.count; ++i)  // as it is
    std::memcpy(gram + (args.begin + i) * args.gram_stride + args.begin + begin, stripe + i * width + begin,
                (end - begin) * sizeof(C));
  // Mirrored, in squares of a cache line by as many rows. What lies on the diagonal is there already.
  for (int64_t m = begin < args.count ? args.count / side * side : begin; m < end; m += side)
    for (int64_t i = 0; i < args.count; i += side) {
      int64_t rows = args.count - i < side ? args.count - i : side, columns = end - m < side ? end - m : side;
      C square[side][side];
      if (rows < side || columns < side) std::memset(square, 0, sizeof square);
      for (int64_t a = 0; a < rows; ++a) std::memcpy(square[a], stripe + (i + a) * width + m, columns * sizeof(C));
      for (int64_t b = 0; b < columns; ++b) {
        if (m + b < args.count) continue;
        C* to = gram + (args.begin + m + b) * args.gram_stride + args.begin + i;
        C mirrored[side];
        for (int64_t a = 0; a < side; ++a) mirrored[a] = square[a][b];
        std::memcpy(to, mirrored, rows * sizeof(C));
      }
    }
}

}  // namespace

void matching_pursuit_spread(const SpreadArgs& args, int64_t begin, int64_t end) {
  if (args.accumulator == DType::f64) spread<double>(args, begin, end);
  else spread<float>(args, begin, end);
}

void matching_pursuit_lengths(const LengthArgs& args, int64_t begin, int64_t end) {
  auto measure = [&](auto* rows) {
    for (int64_t i = begin; i < end; ++i)
      args.lengths[i] = std::sqrt(squared_norm(rows + args.order[i] * args.D, args.D));
  };
  if (args.accumulator == DType::f64) measure(static_cast<const double*>(args.rows));
  else measure(static_cast<const float*>(args.rows));
}

// ---- rows, by the Gram matrix ----
//
// Error bound. What decides is the key of pursuit.h. What is tracked, s, stays within `bound` of a.r, a being what is
// scored; A, R, u and g as there:
//   the key itself, and a's own rounding                            of_product(R)
//   s at first: a product                                           g A R
//   a step: the product c G[j] of step c (c = |w| times the coefficient, w = a |w|), G[j] rounded in g A^2,
//   c in 3 u, and the subtraction, in u of what it leaves           |c| A^2 (g + 16 u) + 4 u A R
//   and r - c w in 2 u of each part, which a.r then sees            4 u A R
// A step is a projection (of atoms whose norm is off 1 by so little that |w|^2 < 2): |r| grows by rounding alone,
// g + 32 u. Below u times the least normal number all this is in absolute terms, which `floor` covers.
//
// So an atom can be the best only if its s is within 2 (bound + of_product) of the largest s. There is seldom another:
// it is scored exactly anyway, since that is its coefficient. If there are some, all of them are; if there are many, or
// there have been, every atom is, which makes s and the bound as good as new: relative to r as it is now.

namespace {

// What fp64 squares of fp32 numbers can't underflow below, nor those of fp64 above.
template <typename C> inline constexpr double kLeastLength = sizeof(C) == 8 ? 1e-140 : 0;

template <typename C> struct Aligned {  // whole vectors, and one more
  explicit Aligned(int64_t count) : data(new (std::align_val_t(64)) C[(count + 127) / 64 * 64]) {}
  ~Aligned() { ::operator delete[](data, std::align_val_t(64)); }
  Aligned(const Aligned&) = delete;
  C* data;
};

template <typename T, bool Absolute> class Pursuer {
  using C = Accumulator<T>;
  using V = Vector<C>;
  static constexpr int kLane = kLanes<C>;
  static constexpr int64_t kBlock = 16 * kLane;  // latents that have their maxima in common
  static constexpr int64_t kMost = 256;          // candidates
  static constexpr int64_t kAhead = 4096 / sizeof(C);  // of the memory's latency

 public:
  explicit Pursuer(const GramPursuitArgs& args)
      : args_(args), atoms_(static_cast<const T*>(args.atoms)), error_(args.D, args.sizes),
        width_((args.M + kLane - 1) / kLane * kLane), s_(width_), maxima_((width_ + kBlock - 1) / kBlock * kLane),
        r_(args.D) {
    while (first_ < args.M && args.norms.squares && args.norms.squares[first_] == 0) ++first_;
  }

  void row(int64_t n) {
    T* values = static_cast<T*>(args_.values) + n * args_.k;
    int64_t* indices = args_.indices + n * args_.k;
    start(n);
    int64_t t = 0;
    for (; t < args_.k; ++t) {
      if (args_.tol > 0 && std::sqrt(squared_norm(r_.data, args_.D)) <= args_.tol) break;
      Scored best = choose();
      C value = coefficient_of(best.product, best.latent, args_.norms);
      if (Absolute ? value == 0 : value <= 0) break;
      from_float(value, values[t]);
      indices[t] = best.latent;
      subtract(r_.data, value, atoms_ + best.latent * args_.D, args_.D);
      if (value != value) {  // nothing but NaN is left: every atom has that score, and the first is taken
        while (++t < args_.k) {
          from_float(value, values[t]);
          indices[t] = first_;
        }
        break;
      }
      if (t + 1 < args_.k) track(value, best.latent);
    }
    for (; t < args_.k; ++t) {
      from_float(C(0), values[t]);
      indices[t] = 0;
    }
    T* residual = static_cast<T*>(args_.residual) + n * args_.D;
    int64_t d = 0;
    for (; d + kLane <= args_.D; d += kLane) store(load(r_.data + d), residual + d);
    for (; d < args_.D; ++d) from_float(r_.data[d], residual[d]);
  }

 private:
  struct Scored {
    C key, product;
    int64_t latent;
  };

  static V magnitude(V score) {
    if constexpr (Absolute) return absolute(score);
    else return score;
  }

  void start(int64_t n) {
    const T* x = static_cast<const T*>(args_.x) + n * args_.x_stride;
    int64_t d = 0;
    for (; d + kLane <= args_.D; d += kLane) store(load(x + d), r_.data + d);
    for (; d < args_.D; ++d) r_.data[d] = to_float(x[d]);
    const C* scores = static_cast<const C*>(args_.scores) + n * args_.M;
    length_ = std::sqrt(squared_norm(r_.data, args_.D)) * KeyError<C>::safety;
    spent_ = 0;
    trusted_ = true;
    bound_ = tame() ? error_.product() * error_.largest() * length_ + error_.floor(length_) : KeyError<C>::infinite;
    if (bound_ < KeyError<C>::infinite) {
      // What fills the last vector must not win: 0 doesn't where keys are absolute, being the last.
      C none = Absolute ? C(0) : -std::numeric_limits<C>::infinity();
      for (int64_t m = args_.M; m < width_; ++m) s_.data[m] = none;
      std::memcpy(s_.data, scores, args_.M * sizeof(C));
      sweep([&](int64_t v) __attribute__((always_inline)) { return load(s_.data + v); });
    }
  }

  // Whether the scores of this row can be tracked.
  bool tame() const { return trusted_ && error_.tame(length_) && length_ >= kLeastLength<C>; }

  // Writes at(v), the vector of scores at latent v, and the largest key of every lane of every block.
  template <typename At> void sweep(const At& at) {
    const V least = broadcast(-std::numeric_limits<C>::infinity());
    C* maxima = maxima_.data;
    for (int64_t v = 0; v < width_; maxima += kLane) {
      int64_t end = v + kBlock < width_ ? v + kBlock : width_;
      V even = least, odd = least;
      for (; v + 2 * kLane <= end; v += 2 * kLane) {
        V first = at(v), second = at(v + kLane);
        store(first, s_.data + v);
        store(second, s_.data + v + kLane);
        even = at_least(magnitude(first), even);
        odd = at_least(magnitude(second), odd);
      }
      for (; v < end; v += kLane) {
        V score = at(v);
        store(score, s_.data + v);
        even = at_least(magnitude(score), even);
      }
      store(at_least(even, odd), maxima);
    }
  }

  // The atom with the largest exact score.
  Scored choose() {
    if (bound_ < KeyError<C>::infinite && spent_ <= args_.M) {
      V most = load(maxima_.data);
      for (int64_t b = kBlock, at = kLane; b < width_; b += kBlock, at += kLane)
        most = at_least(load(maxima_.data + at), most);
      C top = most[0];
      for (int i = 1; i < kLane; ++i) top = most[i] > top ? most[i] : top;
      double off = KeyError<C>::safety * (bound_ + error_.of_product(length_));
      if (collect(C(double(top) - 2.2 * off))) {
        Scored best = best_candidate();
        C tracked = s_.data[best.latent];
        double gap = std::fabs(double(best.key) - double(Absolute ? std::fabs(tracked) : tracked));
        if (gap <= off) return best;
        trusted_ = false;  // the library's product isn't of this precision
      }
    }
    return score_all();
  }

  // Lists the atoms whose key reaches `threshold`; false if they are too many.
  bool collect(C threshold) {
    count_ = 0;
    const V bound = broadcast(threshold);
    const C* maxima = maxima_.data;
    for (int64_t begin = 0; begin < width_; begin += kBlock, maxima += kLane) {
      if (__builtin_expect(!not_below(load(maxima), bound), 1)) continue;
      int64_t end = begin + kBlock < width_ ? begin + kBlock : width_;
      for (int64_t v = begin; v < end; v += kLane)
        for (uint32_t lanes = not_below(magnitude(load(s_.data + v)), bound); lanes; lanes &= lanes - 1) {
          int64_t latent = v + __builtin_ctz(lanes);
          if (latent >= args_.M) continue;
          if (count_ == kMost) return false;
          candidates_[count_++] = latent;
        }
    }
    return count_ > 0;
  }

  Scored best_candidate() {
    prefetch_gram(candidates_[0]);
    Scored best = score(candidates_[0]);
    for (int64_t i = 1; i < count_; ++i)
      if (Scored other = score(candidates_[i]); beats(other.key, best.key)) best = other;
    spent_ += count_ - 1;
    return best;
  }

  Scored score(int64_t latent) const {
    const T* rows[1] = {atoms_ + latent * args_.D};
    C product[1];
    dots<1>(r_.data, rows, args_.D, product);
    return {key(product[0], latent), product[0], latent};
  }
  C key(C product, int64_t latent) const { return key_of(product, latent, args_.norms, !Absolute); }

  // Scores every atom exactly: s is then as good as it gets.
  Scored score_all() {
    length_ = std::sqrt(squared_norm(r_.data, args_.D)) * KeyError<C>::safety;
    if (length_ != length_) return {C(length_), C(length_), first_ < args_.M ? first_ : 0};
    constexpr int together = 4;
    Scored best = score(0);
    int64_t m = 0;
    auto take = [&](C product, int64_t latent) {
      C key = this->key(product, latent);
      s_.data[latent] = Absolute ? std::copysign(key, product) : key;
      if (beats(key, best.key)) best = {key, product, latent};
    };
    for (; m + together <= args_.M; m += together) {
      const T* rows[together];
      for (int i = 0; i < together; ++i) rows[i] = atoms_ + (m + i) * args_.D;
      C products[together];
      dots<together>(r_.data, rows, args_.D, products);
      for (int i = 0; i < together; ++i) take(products[i], m + i);
    }
    for (; m < args_.M; ++m) take(score(m).product, m);
    spent_ = 0;
    bound_ = tame() ? error_.of_product(length_) : KeyError<C>::infinite;
    return best;
  }

  // Scores after a step.
  void track(C value, int64_t latent) {
    if (!(bound_ < KeyError<C>::infinite)) return;
    const double* squares = args_.norms.squares;
    C step = squares ? C(double(value) * std::sqrt(squares[latent])) : value;
    double floor = error_.floor(length_);
    if (!(std::fabs(double(step)) <= 4 * length_ + floor)) {  // a coefficient that overflowed
      bound_ = KeyError<C>::infinite;
      return;
    }
    const C* gram = static_cast<const C*>(args_.gram) + latent * args_.gram_stride;
    const V by = broadcast(step);
    sweep([&](int64_t v) __attribute__((always_inline)) {
      prefetch(gram + v + kAhead);
      return load(s_.data + v) - by * load(gram + v);
    });
    double A = error_.largest(), g = error_.product(), u = KeyError<C>::unit;
    bound_ += std::fabs(double(step)) * A * A * (g + 16 * u) + 8 * u * A * length_ + floor;
    length_ += (g + 32 * u) * length_ + floor;
  }

  void prefetch_gram(int64_t latent) const {
    const C* gram = static_cast<const C*>(args_.gram) + latent * args_.gram_stride;
    int64_t end = kAhead < args_.gram_stride ? kAhead : args_.gram_stride;
    for (int64_t v = 0; v < end; v += 64 / int64_t(sizeof(C))) prefetch(gram + v);
  }

  const GramPursuitArgs& args_;
  const T* atoms_;
  KeyError<C> error_;
  int64_t width_, first_ = 0;  // whole vectors of latents; the first atom that isn't zero
  Aligned<C> s_, maxima_, r_;
  double length_, bound_;  // R, and the bound above
  bool trusted_;
  int64_t spent_, count_;  // exact scores beyond one a step since all atoms had one; candidates
  int64_t candidates_[kMost];
};

template <typename T, bool Absolute> void rows(const GramPursuitArgs& args, int64_t begin, int64_t end) {
  Pursuer<T, Absolute> pursuer(args);
  for (int64_t n = begin; n < end; ++n) pursuer.row(n);
}

}  // namespace

void matching_pursuit(const GramPursuitArgs& args, int64_t row_begin, int64_t row_end) {
  with_type(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (args.nonnegative) rows<T, false>(args, row_begin, row_end);
    else rows<T, true>(args, row_begin, row_end);
  });
}

}  // namespace fastsparse::FASTSPARSE_ISA
