#include "cpu/integers.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <utility>

#include "cpu/simd.h"

namespace fastsparse::FASTSPARSE_ISA {

namespace {

constexpr float kToInteger = 0x1.8p23f;  // a number's nearest integer is in the last bits of their sum
constexpr float kLeast = 0x1p-100f;      // rows of none but smaller numbers are taken for zeros

struct Size {
  float most, norm;  // the largest magnitude, NaN where a number isn't finite; and no less than the norm
};

template <typename T> Size size_of(const T* row, int64_t D) {
  constexpr int lanes = kLanes<float>, ways = 4;  // sums that don't wait for one another
  Vector<float> most[ways] = {}, squares[ways] = {};
  auto take = [](Vector<float> numbers, Vector<float>& most, Vector<float>& squares) __attribute__((always_inline)) {
    most = at_least(absolute(numbers), most);
    squares += numbers * numbers;
  };
  int64_t d = 0;
  for (; d + ways * lanes <= D; d += ways * lanes)
#pragma GCC unroll 4
    for (int way = 0; way < ways; ++way) take(load(row + d + way * lanes), most[way], squares[way]);
  for (; d < D; d += lanes) take(load_up_to(row + d, D - d), most[0], squares[0]);
#pragma GCC unroll 4
  for (int way = 1; way < ways; ++way) {
    most[0] = at_least(most[way], most[0]);
    squares[0] += squares[way];
  }
  float largest = 0, squared = sum<float>(squares[0]);
  for (int i = 0; i < lanes; ++i) largest = std::max(largest, most[0][i]);
  if (!(squared <= FLT_MAX))
    for (int64_t i = 0; i < D; ++i)
      if (!(std::fabs(to_float(row[i])) <= FLT_MAX)) largest = NAN;
  bool in_range = squared > 1e-25f && squared < 1e30f;  // else squares may have left fp32's
  double norm = in_range ? std::sqrt(double(squared)) : largest * std::sqrt(double(D));
  return {largest, float(norm * (1 + double(D) * 0x1p-23))};
}

struct Scale {
  float up, down;  // to integers and back; both 0 for rows that are zeros, or not finite
};

// Such that neither an integer nor, each being off by a half, the row is too large.
Scale scale_of(Size size, int64_t D) {
  if (!(size.most >= kLeast)) return {0, 0};
  double longest = (kLongest - 0.5 * std::sqrt(double(D))) * (1 - 0x1p-20);
  auto up = float(std::min(kLargestInteger / double(size.most), longest / size.norm));
  return {up, 1 / up};
}

// From blocks of `Size` elements of two vectors, by turns: the first ones of each two, or the others.
template <int Size, bool Others, size_t... I> inline Words blocks(Words a, Words b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (I / Size % 2 * sizeof...(I) + I - I / Size % 2 * Size + Others * Size)...);
}
constexpr int kRows = kLanes<float>;  // at a time
using Every = std::make_index_sequence<kRows>;

// The matrix of kRows rows turned on its diagonal.
template <int Size = 1> inline void transpose(Words (&rows)[kRows]) {
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    if (i & Size) continue;
    Words a = rows[i], b = rows[i + Size];
    rows[i] = blocks<Size, false>(a, b, Every{});
    rows[i + Size] = blocks<Size, true>(a, b, Every{});
  }
  if constexpr (2 * Size < kRows) transpose<2 * Size>(rows);
}

typedef uint64_t Long __attribute__((vector_size(kVectorBytes)));

// The kRows pairs of a row's next 2 kRows numbers, of which only `left` may be there: the first half of them in every second
// place, the others between them. Adds up squares of what the numbers have become and of what is lost.
template <typename T>
inline Words pairs_of(const T* row, int64_t left, Scale scale, Vector<float>& norm_squared, Vector<float>& residual_squared) {
  Long pairs[2];
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    Vector<float> exact = load_up_to(row + half * kRows, std::max<int64_t>(left - half * kRows, 0));
    Vector<float> sums = exact * scale.up + kToInteger, near = (sums - kToInteger) * scale.down, gap = exact - near;
    Long integers = (Long)((Words)sums - (Words)broadcast(kToInteger));
    pairs[half] = (integers & 0xffff) | (integers >> 16 & 0xffff0000);
    norm_squared += near * near;
    residual_squared += gap * gap;
  }
  return (Words)(pairs[0] | pairs[1] << 32);
}
constexpr int64_t pair_at(int i) { return i / 2 + i % 2 * kRows / 2; }

// The norms of a row, of its integers from `to` on; never less than they are (see rows.cpp), and infinite where `most`,
// the row's largest magnitude, is NaN.
template <typename T>
void set_norms(const T* row, int64_t D, float most, Scale scale, int64_t height, const int16_t* to, double norm_squared,
               double residual_squared, float& norm, float& residual) {
  if (most != most) {
    norm = residual = std::numeric_limits<float>::infinity();
    return;
  }
  if (!(norm_squared > 1e-25 && norm_squared < 1e30 && residual_squared < 1e30)) {  // squares may have left fp32's range
    norm_squared = residual_squared = 0;
    for (int64_t d = 0; d < D; ++d) {
      double near = double(to[d / 2 * 2 * height + d % 2]) * scale.down, gap = double(to_float(row[d])) - near;
      norm_squared += near * near;
      residual_squared += gap * gap;
    }
  }
  double safety = 1 + double(D) * 0x1p-23, length = std::sqrt(norm_squared + double(D) * 0x1p-149) * safety;
  norm = float(length);
  residual = float(std::sqrt(residual_squared + double(D) * 0x1p-149) * safety + length * 0x1p-23);
}

// Of kRows rows and columns that a panel has, those of its rows from `row` on.
template <typename T>
void round_rows(const T* const (&from)[kRows], int64_t D, const Scale (&scales)[kRows], int64_t height, int64_t row,
                int16_t* panel, Vector<float> (&norms)[kRows], Vector<float> (&residuals)[kRows]) {
  const int64_t pairs = panel_integers(D, 1) / 2;
  const bool whole = height - row >= kRows;
  for (int64_t p = 0; p < pairs; p += kRows) {
    Words block[kRows];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
      block[i] = from[i] ? pairs_of(from[i] + 2 * p, D - 2 * p, scales[i], norms[i], residuals[i]) : Words{};
    transpose(block);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
      if (int64_t pair = p + pair_at(i); pair < pairs) {
        int16_t* to = panel + 2 * (pair * height + row);
        if (whole) std::memcpy(to, &block[i], sizeof block[i]);
        else std::memcpy(to, &block[i], (height - row) * sizeof(uint32_t));
      }
  }
}

template <typename T>
void round_panel(const Rows& rows, int64_t first, int64_t there, int64_t height, const Rounded& to, int16_t* panel) {
  for (int64_t row = 0; row < height; row += kRows) {
    const T* from[kRows] = {};
    Size sizes[kRows];
    Scale scales[kRows];
    Vector<float> norms[kRows] = {}, residuals[kRows] = {};
    const int64_t count = std::min<int64_t>(kRows, there - row);
    for (int64_t i = 0; i < count; ++i) {
      const T* numbers = row_of<T>(rows, first + row + i);
      sizes[i] = size_of(numbers, rows.D);
      scales[i] = scale_of(sizes[i], rows.D);
      if (scales[i].up) from[i] = numbers;
      to.scale[first + row + i] = scales[i].down;
    }
    round_rows<T>(from, rows.D, scales, height, row, panel, norms, residuals);
    for (int64_t i = 0; i < count; ++i)
      set_norms(row_of<T>(rows, first + row + i), rows.D, sizes[i].most, scales[i], height, panel + 2 * (row + i),
                sum<float>(norms[i]), sum<float>(residuals[i]), to.norm[first + row + i], to.residual[first + row + i]);
  }
}

}  // namespace

void integers_round(const Rows& rows, int64_t count, int64_t height, const Rounded& to, int64_t panel_begin,
                    int64_t panel_end) {
  with_type(rows.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(T) < 8)  // fp64 is never screened
      for (int64_t p = panel_begin; p < panel_end; ++p)
        round_panel<T>(rows, p * height, std::min(height, count - p * height), height, to,
                       static_cast<int16_t*>(to.rows) + p * panel_integers(rows.D, height));
  });
}

}  // namespace fastsparse::FASTSPARSE_ISA
