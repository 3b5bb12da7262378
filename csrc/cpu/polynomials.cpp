#include "cpu/polynomials.h"

#include <algorithm>
#include <cmath>

#include "cpu/lanes.h"

namespace fastsparse::FASTSPARSE_ISA {

namespace {

template <typename T> void widen(const void* from, Accumulator<T>* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = to_float(static_cast<const T*>(from)[i]);
}

// One over the root of a mean square.
template <typename C> C inverse_root(C squares, int64_t D, double eps) { return 1 / std::sqrt(squares / C(D) + C(eps)); }

template <typename T, typename Kind> void forward(const PolynomialArgs& args, int64_t row_begin, int64_t row_end) {
  using C = Accumulator<T>;
  C weight[kPowers], bias[1], k[kPowers];
  widen<T>(args.weight, weight, kPowers);
  widen<T>(args.bias, bias, 1);
  std::copy(weight, weight + kPowers, k);
  const Range all{0, args.D};
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
    T* y = static_cast<T*>(args.out) + row * args.D;
    if constexpr (Kind::kNormed) {
      PolynomialSums<Vector<C>> sums{};
      for_vectors<C>(all, [&](int64_t d, auto lanes) { sums.add_squares(lanes.load(x + d)); });
      for (int p = 0; p < kPowers; ++p) k[p] = weight[p] * inverse_root(sum<C>(sums.squares[p]), args.D, args.eps);
    }
    for_vectors<C>(all, [&](int64_t d, auto lanes) {
      lanes.store(weighted_powers(Kind::base(lanes.load(x + d)), k, bias[0]), y + d);
    });
  }
}

template <typename T, typename Kind> void backward(const PolynomialArgs& args, int64_t block) {
  using C = Accumulator<T>;
  C weight[kPowers], k[kPowers], w[kPowers] = {};
  widen<T>(args.weight, weight, kPowers);
  std::copy(weight, weight + kPowers, k);
  const Range all{0, args.D};
  double total[kPowers + 1] = {};
  const int64_t end = std::min(args.N, (block + 1) * kPolynomialRows);
  for (int64_t row = block * kPolynomialRows; row < end; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * args.x_stride;
    const T* g = static_cast<const T*>(args.d_y) + row * args.d_y_stride;
    if (Kind::kNormed || args.sums) {
      PolynomialSums<Vector<C>> sums{};
      for_vectors<C>(all, [&](int64_t d, auto lanes) {
        Vector<C> base = Kind::base(lanes.load(x + d));
        if constexpr (Kind::kNormed) sums.add_squares(base);
        sums.add_products(base, lanes.load(g + d));
      });
      for (int p = 0; p < kPowers; ++p) {
        C product = sum<C>(sums.products[p]);
        if constexpr (Kind::kNormed) {
          C s = inverse_root(sum<C>(sums.squares[p]), args.D, args.eps);
          product *= s;
          k[p] = weight[p] * s;
          w[p] = s * (product / C(args.D));
        }
        total[p] += double(product);
      }
      total[kPowers] += double(sum<C>(sums.products[kPowers]));
    }
    if (!args.out) continue;
    T* d_x = static_cast<T*>(args.out) + row * args.D;
    for_vectors<C>(all, [&](int64_t d, auto lanes) {
      lanes.store(Kind::back(lanes.load(x + d), lanes.load(g + d), k, w), d_x + d);
    });
  }
  if (args.sums) std::copy(total, total + kPowers + 1, args.sums + block * (kPowers + 1));
}

template <typename F> void with_kind(const PolynomialArgs& args, F&& f) {
  with_type(args.dtype, [&](auto tag) {
    if (args.kind == PolynomialKind::norm) f(tag, PolyNorm{});
    else f(tag, PolyRelu{});
  });
}

}  // namespace

void polynomial(const PolynomialArgs& args, int64_t row_begin, int64_t row_end) {
  with_kind(args, [&](auto tag, auto kind) {
    forward<typename decltype(tag)::type, decltype(kind)>(args, row_begin, row_end);
  });
}

void polynomial_backward(const PolynomialArgs& args, int64_t block_begin, int64_t block_end) {
  with_kind(args, [&](auto tag, auto kind) {
    for (int64_t block = block_begin; block < block_end; ++block)
      backward<typename decltype(tag)::type, decltype(kind)>(args, block);
  });
}

}  // namespace fastsparse::FASTSPARSE_ISA
