#include "cpu/matching_pursuit_backward.h"

#include "cpu/dot.h"

namespace fastsparse::FASTSPARSE_ISA {

int64_t matching_pursuit_backward_vector_bytes() { return kVectorBytes; }

namespace {

template <typename T> void row_backward(const PursuitBackwardArgs& args, int64_t n) {
  using C = Accumulator<T>;
  constexpr int lanes = kLanes<C>;
  int64_t D = args.D, k = args.k;
  auto atom = [&](int64_t m) { return static_cast<const T*>(args.dictionary) + m * args.atom_stride; };
  const int64_t* indices = args.indices + n * k;
  const C* values = static_cast<const C*>(args.values) + n * k;
  const C* d_values = static_cast<const C*>(args.d_values) + n * k;
  auto* steps = static_cast<PursuitStep<C>*>(args.steps) + n * k;
  C* g = static_cast<C*>(args.g) + n * D;

  const T* d_residual = args.d_residual ? static_cast<const T*>(args.d_residual) + n * args.d_residual_stride : nullptr;
  int64_t d = 0;
  for (; d + lanes <= D; d += lanes) store(d_residual ? load(d_residual + d) : Vector<C>{}, g + d);
  for (; d < D; ++d) g[d] = d_residual ? to_float(d_residual[d]) : C(0);

  for (int64_t t = k - 1; t >= 0; --t) {
    if (t > 0)
      for (int64_t ahead = 0; ahead < D; ahead += 64 / sizeof(T)) prefetch(atom(indices[t - 1]) + ahead);
    PursuitStep<C>& step = steps[k - 1 - t];
    step = {indices[t], values[t], 0};
    if (step.c == 0) continue;
    const T* w[1] = {atom(step.atom)};
    C product[1];
    dots<1>(g, w, D, product);
    step.q = d_values[t] - product[0];
    if (!args.normalized) step.q = C(step.q / squared_norm(w[0], D));
    for (d = 0; d + lanes <= D; d += lanes) store(load(g + d) + broadcast(step.q) * load(w[0] + d), g + d);
    for (; d < D; ++d) g[d] += step.q * to_float(w[0][d]);
  }
}

}  // namespace

void matching_pursuit_backward_rows(const PursuitBackwardArgs& args, int64_t row_begin, int64_t row_end) {
  with_type(args.dtype, [&](auto tag) {
    for (int64_t n = row_begin; n < row_end; ++n) row_backward<typename decltype(tag)::type>(args, n);
  });
}

namespace {

// `Whole`: the panel ends before the rows do, and nothing need be checked.
template <int Vectors, bool Whole, typename T>
void panel_backward(const PursuitBackwardArgs& args, int64_t begin, Accumulator<T>* sums) {
  using C = Accumulator<T>;
  constexpr int lanes = kLanes<C>, width = Vectors * lanes;
  constexpr int64_t ahead = 8, line = 64 / sizeof(C);
  auto columns = [&](const T* row, int v) {
    int64_t left = args.D - begin - v * lanes;
    if constexpr (Whole) return load(row + begin + v * lanes);
    else return left > 0 ? load_up_to(row + begin + v * lanes, left) : Vector<C>{};
  };
  std::memset(static_cast<void*>(sums), 0, args.M * width * sizeof(C));

  auto* dictionary = static_cast<const T*>(args.dictionary);
  auto *step = static_cast<const PursuitStep<C>*>(args.steps), *end = step + args.N * args.k;
  for (int64_t n = 0; n < args.N; ++n) {
    Vector<C> r[Vectors], g[Vectors];
    for (int v = 0; v < Vectors; ++v) {
      r[v] = columns(static_cast<const T*>(args.residual) + n * args.residual_stride, v);
      g[v] = args.d_residual ? columns(static_cast<const T*>(args.d_residual) + n * args.d_residual_stride, v)
                             : Vector<C>{};
    }
    for (auto* last = step + args.k; step < last; ++step) {
      if (step + ahead < end) {
        int64_t later = step[ahead].atom;
        for (int64_t c = 0; c < width; c += line) {
          prefetch(dictionary + later * args.atom_stride + begin + c);
          prefetch(sums + later * width + c);
        }
      }
      if (step->c == 0) continue;
      const T* atom = dictionary + step->atom * args.atom_stride;
      C* sum = sums + step->atom * width;
      Vector<C> c = broadcast(step->c), q = broadcast(step->q);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        Vector<C> taken = c * columns(atom, v);
        Vector<C> before = r[v] + taken, factor = args.normalized ? before : r[v] - taken;
        store(load(sum + v * lanes) + (q * factor - c * g[v]), sum + v * lanes);
        r[v] = before;
        g[v] += q * columns(atom, v);
      }
    }
  }

  for (int64_t m = 0; m < args.M; ++m) {
    T* out = static_cast<T*>(args.d_dictionary) + m * args.D + begin;
    const C* sum = sums + m * width;
    if constexpr (Whole)
      for (int v = 0; v < Vectors; ++v) store(load(sum + v * lanes), out + v * lanes);
    else
      for (int64_t d = 0; d < args.D - begin; ++d) from_float(sum[d], out[d]);
  }
}

template <int Vectors, typename T> void panel(const PursuitBackwardArgs& args, int64_t begin, void* sums) {
  using C = Accumulator<T>;
  if (begin + Vectors * kLanes<C> <= args.D) panel_backward<Vectors, true, T>(args, begin, static_cast<C*>(sums));
  else panel_backward<Vectors, false, T>(args, begin, static_cast<C*>(sums));
}

}  // namespace

void matching_pursuit_backward_columns(const PursuitBackwardArgs& args, int64_t begin, int64_t vectors, void* sums) {
  with_type(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (vectors == 4) panel<4, T>(args, begin, sums);
    else panel<1, T>(args, begin, sums);
  });
}

}  // namespace fastsparse::FASTSPARSE_ISA
