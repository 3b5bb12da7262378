#include "cpu/rows.h"

#include <cmath>

#include "cpu/bf16_panels.h"
#include "cpu/dot.h"

namespace fastsparse::FASTSPARSE_ISA {

namespace {

// Into a panel, a quad lies `height` quads behind the one before, and a vector is a quad; else `height` is 1.
template <typename T>
void round_row(const T* row, int64_t D, int64_t height, bf16* rounded, float& norm, float& residual) {
  constexpr int lanes = kLanes<float>;
  static_assert(!kBf16Panels || lanes == kQuad);
  auto at = [&](int64_t d) { return rounded + d / kQuad * kQuad * height + d % kQuad; };
  Vector<float> norm_lanes = {}, residual_lanes = {};
  int64_t d = 0;
  for (; d + lanes <= D; d += lanes) {
    Vector<float> exact = load(row + d);
    store(exact, rounded + d * height);
    Vector<float> near = load(rounded + d * height), gap = exact - near;
    norm_lanes += near * near;
    residual_lanes += gap * gap;
  }
  float norm_squared = sum<float>(norm_lanes), residual_squared = sum<float>(residual_lanes);
  for (; d < D; ++d) {
    float exact = to_float(row[d]);
    from_float(exact, *at(d));
    float near = to_float(*at(d)), gap = exact - near;
    norm_squared += near * near;
    residual_squared += gap * gap;
  }
  if (height > 1)
    for (; d % kQuad; ++d) *at(d) = bf16{};
  double wide_norm = norm_squared, wide_residual = residual_squared;
  if (!(norm_squared > 1e-25f && norm_squared < 1e30f)) {  // squares may have left fp32's range
    wide_norm = wide_residual = 0;
    for (d = 0; d < D; ++d) {
      double near = to_float(*at(d)), gap = double(to_float(row[d])) - near;
      wide_norm += near * near;
      wide_residual += gap * gap;
    }
  }
  // Sums of D fp32 squares are good to D 2^-24 relatively, and each square to 2^-149 absolutely.
  double safety = 1 + double(D) * 0x1p-23;
  norm = float(std::sqrt(wide_norm + double(D) * 0x1p-149) * safety);
  residual = float(std::sqrt(wide_residual + double(D) * 0x1p-149) * safety);
}

}  // namespace

void rows_round(const Rows& rows, int64_t height, const Rounded& to, int64_t begin, int64_t end) {
  const int64_t panel = height > 1 ? panel_bf16s(rows.D, height) : rows.D;
  with_type(rows.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(T) < 8)  // fp64 is never screened
      for (int64_t i = begin; i < end; ++i)
        round_row(row_of<T>(rows, i), rows.D, height,
                  static_cast<bf16*>(to.rows) + i / height * panel + i % height * kQuad, to.norm[i], to.residual[i]);
  });
}

void rows_widen(const Rows& rows, void* widened, int64_t begin, int64_t end) {
  with_type(rows.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = Accumulator<T>;
    for (int64_t i = begin; i < end; ++i) {
      const T* row = row_of<T>(rows, i);
      C* wide = static_cast<C*>(widened) + i * rows.D;
      int64_t d = 0;
      for (; d + kLanes<C> <= rows.D; d += kLanes<C>) store(load(row + d), wide + d);
      for (; d < rows.D; ++d) wide[d] = to_float(row[d]);
    }
  });
}

namespace {

template <int Count, typename T>
void score(const Rows& x, int64_t n, const T* atom, float* scores, int64_t apart) {
  const T* rows[Count];
  for (int i = 0; i < Count; ++i) rows[i] = row_of<T>(x, n + i);
  Accumulator<T> sums[Count];
  dots<Count>(atom, rows, x.D, sums);
  for (int i = 0; i < Count; ++i) scores[(n + i) * apart] = float(sums[i]);
}

}  // namespace

void rows_score(const Rows& x, int64_t N, const Rows& weight, int64_t count, float* scores, int64_t begin, int64_t end) {
  with_type(weight.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t m = begin; m < end; ++m) {
      const T* atom = row_of<T>(weight, m);
      int64_t n = 0;
      for (; n + 4 <= N; n += 4) score<4>(x, n, atom, scores + m, count);
      for (; n < N; ++n) score<1>(x, n, atom, scores + m, count);
    }
  });
}

}  // namespace fastsparse::FASTSPARSE_ISA
