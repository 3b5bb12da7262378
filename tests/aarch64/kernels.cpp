// Holds the CPU kernels against plain loops on the processor that runs this, which may be an emulated one. Prints what it
// has compared, one family a line, and ends with 1 where anything differs.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/bf16_panels.h"
#include "cpu/gated_recurrence.h"
#include "cpu/integers.h"
#include "cpu/linear_recurrence.h"
#include "cpu/screen.h"
#include "cpu/sddmm.h"
#include "cpu/spmm.h"
#include "cpu/topk_encode.h"

using namespace fastsparse;
namespace kernel = fastsparse::baseline;

namespace {

// ---- what is compared ----

const char* family;
int64_t compared = 0, failures = 0;

template <typename... Numbers> void expect(bool right, const char* what, Numbers... numbers) {
  ++compared;
  if (right || ++failures > 20) return;
  std::printf("%s: ", family);
  std::printf(what, numbers...);
  std::printf("\n");
}

template <typename Family> void run(const char* name, const Family& check) {
  family = name;
  compared = 0;
  check();
  std::printf("%s: %lld compared\n", name, static_cast<long long>(compared));
}

// ---- numbers ----

uint64_t state = 1;

uint32_t bits() {  // Knuth's MMIX
  state = state * 6364136223846793005 + 1442695040888963407;
  return uint32_t(state >> 32);
}
double uniform() { return bits() * 0x1p-32; }
double normal() {
  double sum = -6;
  for (int i = 0; i < 12; ++i) sum += uniform();
  return sum;
}

// The processor's own conversions.
double number(float value) { return value; }
double number(double value) { return value; }
double number(bf16 value) {
  uint32_t word = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &word, sizeof result);
  return result;
}
double number(f16 value) {
  __fp16 result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}
void assign(float& to, float value) { to = value; }
void assign(double& to, double value) { to = value; }
void assign(f16& to, float value) {
  __fp16 rounded = value;
  std::memcpy(&to, &rounded, sizeof to);
}
void assign(bf16& to, float value) {  // between two neighbours, the nearer one, or the even one
  bf16 below{uint16_t(0)};
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  below.bits = uint16_t(word >> 16);
  bf16 above{uint16_t(below.bits + 1)};
  double down = std::fabs(double(value) - number(below)), up = std::fabs(number(above) - double(value));
  if (!std::isfinite(value)) to = std::isnan(value) ? bf16{0x7fc0} : below;
  else if (!std::isfinite(number(above))) to = down < 0x1p119 ? below : above;  // half of the last step there is
  else to = down < up || (down == up && below.bits % 2 == 0) ? below : above;
}

template <typename T> constexpr DType dtype_of() {
  return std::is_same_v<T, float> ? DType::f32 : std::is_same_v<T, bf16> ? DType::bf16
       : std::is_same_v<T, f16> ? DType::f16 : DType::f64;
}
// How far off numbers of a type may be, with sums that they come from, of terms with magnitudes of so much.
template <typename T> double tolerance(double size) {
  if (std::is_same_v<T, f16>) return 0x1p-10 * size + 0x1p-25;
  return (std::is_same_v<T, float> ? 1e-5 : std::is_same_v<T, bf16> ? 0x1p-8 : 1e-13) * size;
}

// Kernels may read a vector past the end.
template <typename T> std::vector<T> room(int64_t count) { return std::vector<T>(size_t(count + 64)); }

template <typename T> std::vector<T> random(int64_t count, double scale = 1) {
  auto result = room<T>(count);
  for (int64_t i = 0; i < count; ++i) assign(result[i], Accumulator<T>(scale * normal()));
  return result;
}

template <typename F> void each_type(const F& check) {
  check(float{}), check(bf16{}), check(f16{}), check(double{});
}

bool near(double got, double want, double off) {
  return std::isnan(want) ? std::isnan(got) : got == want || std::fabs(got - want) <= off;
}

// ---- rows in fewer bits ----

enum Kind { kNormal, kEqual, kSigns, kZero, kHugeAndTiny, kSubnormal, kWorst, kNotFinite, kKinds };

template <typename T> void fill(T* row, int64_t D, int kind) {
  for (int64_t d = 0; d < D; ++d) {
    double value = normal();
    if (kind == kEqual) value = 1;
    if (kind == kSigns) value = bits() % 2 ? 3.5 : -3.5;
    if (kind == kZero) value = 0;
    if (kind == kHugeAndTiny) value *= std::is_same_v<T, f16> ? (d % 3 ? 1e-6 : 1e4) : (d % 3 ? 1e-30 : 1e30);
    if (kind == kSubnormal) value *= std::is_same_v<T, f16> ? 1e-7 : 1e-39;
    // Each of the small ones is rounded to twice its size by who rounds to odd.
    if (kind == kWorst) value = d % 2 ? 0 : d == 0 ? 1 : d + 2 < D ? 0x1.02p-23 : -1;
    if (kind == kNotFinite && d == D / 2) value = bits() % 2 ? NAN : INFINITY;
    assign(row[d], Accumulator<T>(value));
  }
}

struct Side {
  std::vector<int16_t> rows;  // integers, or the bits of bf16
  std::vector<float> norm, residual, scale;
  Rounded rounded;

  Side(int64_t count, int64_t numbers)
      : rows(room<int16_t>(numbers)), norm(room<float>(count)), residual(norm), scale(norm),
        rounded{rows.data(), 0, norm.data(), residual.data(), scale.data()} {}
};

// In panels, `of` columns together.
int64_t place(int64_t row, int64_t column, int64_t panel, int64_t height, int64_t of) {
  return row / height * panel + column / of * of * height + row % height * of + column % of;
}
int64_t place_of_integer(int64_t row, int64_t column, int64_t D, int64_t height) {
  return place(row, column, panel_integers(D, height), height, 2);
}
int64_t place_of_bf16(int64_t row, int64_t column, int64_t D, int64_t height) {
  return place(row, column, panel_bf16s(D, height), height, kQuad);
}

// Norms are never less than what they are of, and not much more.
template <typename T, typename Near>
void check_norms(const T* row, int64_t D, float norm, float residual, const Near& near) {
  double squares = 0, lost = 0;
  for (int64_t d = 0; d < D; ++d) {
    double exact = number(row[d]), rounded = near(d);
    if (!std::isfinite(exact))
      return expect(!(norm <= FLT_MAX && residual <= FLT_MAX), "D=%ld: finite norms of a row that isn't", D);
    squares += rounded * rounded, lost += (exact - rounded) * (exact - rounded);
  }
  double tiny = std::sqrt(double(D)) * 1e-22, length = std::sqrt(squares), gap = std::sqrt(lost);
  expect(norm >= length && norm <= 1.001 * length + tiny, "D=%ld: norm %g of %g", D, norm, length);
  expect(residual >= gap && residual <= 1.001 * gap + 1e-6 * length + tiny, "D=%ld: residual %g of %g", D, residual, gap);
}

template <typename T> Side integers(const std::vector<T>& x, int64_t count, int64_t D, int64_t height) {
  int64_t all = groups(count, height) * strassen::kSide;
  Side side(count, all * panel_integers(D, height));
  std::fill(side.rows.begin(), side.rows.end(), int16_t(-1));  // what isn't written shows
  Rows rows{x.data(), nullptr, D, D, dtype_of<T>()};
  kernel::integers_round(rows, count, height, side.rounded, 0, all);
  for (int64_t i = 0; i < all * height; ++i) {
    auto integer = [&](int64_t d) { return side.rows[place_of_integer(i, d, D, height)]; };
    int64_t squares = 0;
    for (int64_t d = 0; d < panel_integers(D, 1); ++d) {
      if (i >= count || d >= D) expect(integer(d) == 0, "D=%ld: a place that isn't there is %d", D, integer(d));
      squares += int64_t(integer(d)) * integer(d);
    }
    expect(squares <= INT32_MAX, "D=%ld: a row whose square is %ld", D, squares);
    if (i >= count) continue;
    const T* row = &x[i * D];
    check_norms(row, D, side.norm[i], side.residual[i], [&](int64_t d) { return integer(d) * double(side.scale[i]); });
    for (int64_t d = 0; d < D; ++d) {
      double want = side.scale[i] == 0 ? 0 : number(row[d]) / side.scale[i];
      if (std::isfinite(want) && side.norm[i] <= FLT_MAX)
        expect(std::fabs(integer(d) - want) < 0.501 && std::abs(integer(d)) <= kLargestInteger,
               "D=%ld: integer %d of %g", D, integer(d), want);
    }
  }
  return side;
}

template <typename T> Side bf16_panels(const std::vector<T>& x, int64_t count, int64_t D, int64_t height) {
  int64_t numbers = panels(count, height) * panel_bf16s(D, height);
  Side side(count, height > 1 ? numbers : count * D);
  std::fill(side.rows.begin(), side.rows.end(), int16_t(-1));
  kernel::rows_round(Rows{x.data(), nullptr, D, D, dtype_of<T>()}, height, side.rounded, 0, count);
  for (int64_t i = 0; i < count; ++i) {
    const T* row = &x[i * D];
    auto at = [&](int64_t d) {
      return bf16{uint16_t(side.rows[height > 1 ? place_of_bf16(i, d, D, height) : i * D + d])};
    };
    for (int64_t d = 0; d < D; ++d) {
      bf16 want;
      assign(want, float(number(row[d])));
      expect(at(d).bits == want.bits, "D=%ld: bf16 %g of %g", D, number(at(d)), number(row[d]));
    }
    if (height > 1)
      for (int64_t d = D; d % kQuad; ++d) expect(at(d).bits == 0, "D=%ld: a column that isn't there", D);
    check_norms(row, D, side.norm[i], side.residual[i], [&](int64_t d) { return number(at(d)); });
  }
  return side;
}

constexpr int64_t kWidths[] = {1, 2, 3, 4, 5, 7, 8, 9, 31, 63, 64, 65, 127, 200, 511, 512, 513, 1023, 1024, 1025, 1091};

// Rows of every kind, of tokens and latents that fill no panel.
template <typename T, typename Check> void each_width(const Check& check) {
  for (int64_t D : kWidths) {
    int64_t N = 1 + D % 14 + 6 * (D == 1091), M = 1 + D * 7 % 71;
    auto x = room<T>(N * D), weight = room<T>(M * D);
    for (int64_t n = 0; n < N; ++n) fill(&x[n * D], D, int(n + D) % kKinds);
    for (int64_t m = 0; m < M; ++m) fill(&weight[m * D], D, int(m * 5 + D) % kKinds);
    check(x, N, weight, M, D);
  }
}

std::vector<int16_t> combined(const Side& tokens, int64_t N, int64_t D) {
  std::vector<int16_t> result(groups(N, kTokenPanel) * combined_integers(D));
  kernel::integers_combine(tokens.rows.data(), D, result.data(), 0, groups(N, kTokenPanel));
  return result;
}

// Sums are exact, whichever way they are made.
template <typename T> void check_integers() {
  each_width<T>([](const std::vector<T>& x, int64_t N, const std::vector<T>& weight, int64_t M, int64_t D) {
    Side tokens = integers(x, N, D, kTokenPanel), latents = integers(weight, M, D, kLatentPanel);
    std::vector<int16_t> sides = combined(tokens, N, D);
    for (bool strassen : {false, true}) {
      auto scores = room<bf16>(N * M);
      IntegerProduct args{strassen ? sides.data() : tokens.rows.data(), strassen, tokens.scale.data(), latents.rows.data(),
                          latents.scale.data(), N, M, D, scores.data(), false};
      kernel::integers_product(args, 0, groups(M, kLatentPanel));
      for (int64_t n = 0; n < N; ++n)
        for (int64_t m = 0; m < M; ++m) {
          int64_t sum = 0;
          for (int64_t d = 0; d < D; ++d)
            sum += int64_t(tokens.rows[place_of_integer(n, d, D, kTokenPanel)]) *
                   latents.rows[place_of_integer(m, d, D, kLatentPanel)];
          bf16 want;
          assign(want, float(sum) * (tokens.scale[n] * latents.scale[m]));
          expect(scores[n * M + m].bits == want.bits, "D=%ld n=%ld m=%ld: score %g of %g", D, n, m,
                 number(scores[n * M + m]), number(want));
        }
    }
  });
}

// The error that bracket.h allows, beside the result's own rounding; some sums come near half of it.
template <typename T> void check_bf16_panels() {
  double worst = 0;
  each_width<T>([&](const std::vector<T>& x, int64_t N, const std::vector<T>& weight, int64_t M, int64_t D) {
    Side tokens = bf16_panels(x, N, D, kTokenPanel), latents = bf16_panels(weight, M, D, kLatentPanel);
    std::vector<bf16> scores(N * M);
    auto* rows = reinterpret_cast<const bf16*>(tokens.rows.data());
    auto* atoms = reinterpret_cast<const bf16*>(latents.rows.data());
    kernel::bf16_panels_product({rows, atoms, N, M, D, scores.data()}, 0, panels(M, kLatentPanel));
    for (int64_t n = 0; n < N; ++n)
      for (int64_t m = 0; m < M; ++m) {
        long double sum = 0, absolute = 0;
        for (int64_t d = 0; d < D; ++d) {
          long double product = static_cast<long double>(number(rows[place_of_bf16(n, d, D, kTokenPanel)])) *
                                number(atoms[place_of_bf16(m, d, D, kLatentPanel)]);
          sum += product, absolute += fabsl(product);
        }
        double got = number(scores[n * M + m]), want = double(sum), size = double(absolute);
        if (!(size < 1e38)) continue;  // not finite, or perhaps not on the way
        double flushed = double(D) * 0x1p-125 + 0x1p-126 * (tokens.norm[n] + latents.norm[m]) * std::sqrt(double(D));
        double unit = double(D + 2) * 0x1p-24 * size, off = std::fabs(got - want) - 0x1.01p-8 * (std::fabs(want) + unit);
        expect(off <= unit + flushed, "D=%ld n=%ld m=%ld: score %g of %g, magnitudes %g", D, n, m, got, want, size);
        if (size > 1e-20 && D > 1) worst = std::max(worst, off / unit);
      }
  });
  if (!std::is_same_v<T, f16>) expect(worst > 0.4, "no sum is off by more than %g of what the bracket allows", worst);
}

// ---- top-k ----

constexpr int64_t kTokens = 21, kWidth = 90, kLatents = 700, kActive = 8, kCapacity = 128, kStripe = 256;

struct Lists {
  std::vector<char> lists = std::vector<char>(kTokens * list_bytes(kCapacity, 8));
  std::vector<int32_t> counts = std::vector<int32_t>(kTokens);
  std::vector<double> thresholds = std::vector<double>(kTokens);
  Candidates candidates;

  Lists(DType dtype, bool absolute)
      : candidates{kActive, kCapacity, absolute, dtype, lists.data(), counts.data(), thresholds.data()} {
    for (int64_t n = 0; n < kTokens; ++n)
      if (dtype == DType::f64) thresholds[n] = -INFINITY;
      else static_cast<float*>(candidates.threshold)[n] = -INFINITY;
  }
};

// The k largest of all scores, NaN first, ties to the first.
template <typename T> void check_best(const Lists& lists, const std::vector<double>& scores, double off) {
  std::vector<T> values(kTokens * kActive);
  std::vector<int64_t> indices(kTokens * kActive);
  SelectArgs args{nullptr, nullptr, Activation::none, values.data(), indices.data(), kActive, 0, dtype_of<T>()};
  kernel::topk_encode_select(lists.candidates, args, 0, kTokens);
  for (int64_t n = 0; n < kTokens; ++n) {
    std::vector<int64_t> order(kLatents);
    std::iota(order.begin(), order.end(), 0);
    auto key = [&](int64_t m) {
      double score = scores[n * kLatents + m];
      return std::isnan(score) ? INFINITY : lists.candidates.absolute ? std::fabs(score) : score;
    };
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return key(a) > key(b); });
    expect(lists.counts[n] != kHopeless, "n=%ld: hopeless", n);
    for (int64_t j = 0; j < kActive; ++j) {
      int64_t got = indices[n * kActive + j];
      double value = number(values[n * kActive + j]), want = scores[n * kLatents + order[j]];
      expect(got == order[j] && near(value, want, off), "n=%ld j=%ld: %g at %ld, not %g at %ld", n, j, value, got,
             want, order[j]);
    }
  }
}

// Of scores full of ties, with NaN and infinities in some rows.
template <typename T> void check_filter(bool absolute) {
  auto scores = room<T>(kTokens * kLatents);
  for (int64_t i = 0; i < kTokens * kLatents; ++i) assign(scores[i], T(std::round(40 * normal())));
  scores[3] = T(NAN), scores[kLatents + 500] = T(INFINITY), scores[2 * kLatents + 699] = T(-INFINITY);
  auto zeros = room<T>(kLatents);
  Lists lists(dtype_of<T>(), absolute);
  for (int64_t begin = 0, stripes = 0; begin < kLatents; begin += kStripe, ++stripes) {
    int64_t count = std::min(kStripe, kLatents - begin);
    auto part = room<T>(kTokens * count);
    for (int64_t n = 0; n < kTokens; ++n) std::copy_n(&scores[n * kLatents + begin], count, &part[n * count]);
    Stripe stripe{.begin = begin, .count = count, .doubled = stripes < 3, .scores = part.data(), .bias = zeros.data()};
    kernel::topk_encode_filter(lists.candidates, stripe, 0, kTokens);
  }
  check_best<T>(lists, std::vector<double>(scores.begin(), scores.end()), 0);
}

// Screen, certify, refine, select, as edge/topk_encode.cpp and edge/scorer.cpp do it.
void check_screen(bool by_integers, bool absolute) {
  auto x = random<float>(kTokens * kWidth), weight = random<float>(kLatents * kWidth), bias = random<float>(kLatents);
  Lists lists(DType::f32, absolute);
  Side tokens = by_integers ? integers(x, kTokens, kWidth, kTokenPanel) : bf16_panels(x, kTokens, kWidth, kTokenPanel);
  std::vector<int16_t> sides = by_integers ? combined(tokens, kTokens, kWidth) : std::vector<int16_t>();
  for (int64_t begin = 0, stripes = 0; begin < kLatents; begin += kStripe, ++stripes) {
    int64_t count = std::min(kStripe, kLatents - begin);
    std::vector<float> atoms(weight.begin() + begin * kWidth, weight.begin() + (begin + count) * kWidth);
    Side latents = by_integers ? integers(atoms, count, kWidth, kLatentPanel)
                               : bf16_panels(atoms, count, kWidth, kLatentPanel);
    auto scores = room<bf16>(kTokens * count);
    if (by_integers)
      kernel::integers_product({sides.data(), true, tokens.scale.data(), latents.rows.data(), latents.scale.data(), kTokens,
                                count, kWidth, scores.data(), false}, 0, groups(count, kLatentPanel));
    else
      kernel::bf16_panels_product({static_cast<bf16*>(tokens.rounded.rows), static_cast<bf16*>(latents.rounded.rows),
                                   kTokens, count, kWidth, scores.data()}, 0, panels(count, kLatentPanel));
    auto rest = room<float>(count);
    for (int64_t m = 0; m < count; ++m) rest[m] = 0x1p-20f * std::fabs(bias[begin + m]);
    auto most = [&](const std::vector<float>& terms) { return *std::max_element(terms.begin(), terms.begin() + count); };
    Stripe stripe{.begin = begin, .count = count, .doubled = stripes < 3, .scores = scores.data(), .bias = &bias[begin],
                  .D = kWidth, .x_norm = tokens.norm.data(), .x_residual = tokens.residual.data(),
                  .brackets = {latents.norm.data(), latents.residual.data(), rest.data(), most(latents.norm),
                               most(latents.residual), most(rest)}};
    kernel::screen(lists.candidates, stripe, 0, kTokens);
  }
  kernel::screen_certify(lists.candidates, 0, kTokens);
  int64_t survivors = std::accumulate(lists.counts.begin(), lists.counts.end(), int64_t{0});
  expect(survivors >= kTokens * kActive && survivors < kTokens * 3 * kActive, "%ld survivors", survivors);
  auto rows = [](const std::vector<float>& of) { return Rows{of.data(), nullptr, kWidth, kWidth, DType::f32}; };
  RefineArgs args{kTokens, rows(x), rows(weight), bias.data(), nullptr};
  kernel::topk_encode_refine(lists.candidates, args, 0, kLatents);
  std::vector<double> scores(kTokens * kLatents);
  for (int64_t n = 0; n < kTokens; ++n)
    for (int64_t m = 0; m < kLatents; ++m) {
      scores[n * kLatents + m] = bias[m];
      for (int64_t d = 0; d < kWidth; ++d) scores[n * kLatents + m] += double(x[n * kWidth + d]) * weight[m * kWidth + d];
    }
  check_best<float>(lists, scores, 1e-4);
}

// ---- sparse products ----

template <typename T> void check_sparse_products() {
  using C = Accumulator<T>;
  constexpr int64_t N = 5, M = 30;
  for (int64_t D : {1, 2, 3, 4, 7, 8, 33, 71, 150})
    for (int64_t k : {1, 3, 6}) {
      auto values = random<C>(N * k);
      auto weight = random<T>(M * D), x = random<T>(N * D), out = room<T>(N * D), inner = room<T>(N * k);
      std::vector<int64_t> indices(N * k);
      for (int64_t& index : indices) index = bits() % M;
      kernel::spmm({values.data(), indices.data(), weight.data(), out.data(), k, D, D, dtype_of<T>(), {}}, {0, D}, 0, N);
      kernel::sddmm({x.data(), weight.data(), indices.data(), nullptr, inner.data(), N, k, D, D, D, dtype_of<T>()}, 0, N);
      for (int64_t n = 0; n < N; ++n) {
        for (int64_t d = 0; d < D; ++d) {
          double sum = 0, size = 0;
          for (int64_t j = 0; j < k; ++j) {
            double term = double(values[n * k + j]) * number(weight[indices[n * k + j] * D + d]);
            sum += term, size += std::fabs(term);
          }
          expect(near(number(out[n * D + d]), sum, tolerance<T>(size)), "spmm D=%ld k=%ld: %g of %g", D, k,
                 number(out[n * D + d]), sum);
        }
        for (int64_t j = 0; j < k; ++j) {
          double sum = 0, size = 0;
          for (int64_t d = 0; d < D; ++d) {
            double term = number(x[n * D + d]) * number(weight[indices[n * k + j] * D + d]);
            sum += term, size += std::fabs(term);
          }
          expect(near(number(inner[n * k + j]), sum, tolerance<T>(size)), "sddmm D=%ld k=%ld: %g of %g", D, k,
                 number(inner[n * k + j]), sum);
        }
      }
    }
}

// Every number of 16 bits to fp32 and, times a factor that rounds it, back: a row at a time, and a number at a time.
template <typename T> void check_halves() {
  constexpr int64_t all = 65536;
  auto halves = room<T>(all), products = room<T>(all);
  for (int64_t i = 0; i < all; ++i) halves[i].bits = uint16_t(i);
  auto wide = room<float>(all);
  kernel::rows_widen({halves.data(), nullptr, all, all, dtype_of<T>()}, wide.data(), 0, 1);
  for (int64_t i = 0; i < all; ++i)
    expect(near(wide[i], number(halves[i]), 0), "%04lx is %g, not %g", i, wide[i], number(halves[i]));
  for (float factor : {1.0f, 1.0f + 0x1p-5f, 0x1.234568p-3f, 0x1.8p-9f, 300.0f}) {
    int64_t first = 0;
    kernel::spmm({&factor, &first, halves.data(), products.data(), 1, all, all, dtype_of<T>(), {}}, {0, all}, 0, 1);
    auto check = [&](const char* how) {
      for (int64_t i = 0; i < all; ++i) {
        T want;
        assign(want, factor * float(number(halves[i])));
        expect(near(number(products[i]), number(want), 0), "%s: %g of %a * %g", how, number(products[i]), factor,
               number(halves[i]));
      }
    };
    check("vectors");
    T one;
    assign(one, factor);
    if (number(one) != factor) continue;
    std::vector<int64_t> indices(all);
    std::iota(indices.begin(), indices.end(), 0);
    kernel::sddmm({&one, halves.data(), indices.data(), nullptr, products.data(), 1, all, 1, 1, 1, dtype_of<T>()}, 0, 1);
    check("numbers");
  }
}

// ---- recurrences ----

template <typename T> void check_linear_recurrence() {
  for (int64_t H : {1, 2, 3, 5, 8, 13})
    for (int64_t P : {1, 2})
      for (bool reverse : {false, true}) {
        constexpr int64_t T_ = 9;
        auto a = random<T>(T_ * P * P * H, 0.5), b = random<T>(T_ * P * H), h = room<T>(T_ * P * H);
        LinearRecurrenceArgs args{{nullptr, 1, T_}, {a.data(), 0, P * P * H, P * H, H}, {b.data(), 0, P * H, H, 0}, {},
                                  {h.data(), 0, P * H, H, 0}, P == 2, reverse, dtype_of<T>()};
        kernel::linear_recurrence(args, 0, {0, H});
        for (int64_t c = 0; c < H; ++c) {
          double state[2] = {};
          for (int64_t step = 0; step < T_; ++step) {
            int64_t t = reverse ? T_ - 1 - step : step;
            double next[2] = {};
            for (int64_t i = 0; i < P; ++i) {
              next[i] = number(b[(t * P + i) * H + c]);
              for (int64_t j = 0; j < P && step; ++j) next[i] += number(a[((t * P + i) * P + j) * H + c]) * state[j];
            }
            for (int64_t i = 0; i < P; ++i) {
              state[i] = next[i];
              double got = number(h[(t * P + i) * H + c]);
              double off = tolerance<T>(1 + std::fabs(next[i]));
              expect(near(got, next[i], off), "H=%ld t=%ld: %g of %g", H, t, got, next[i]);
            }
          }
        }
      }
}

struct Plain {
  using V = double;
  static double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
  static double tanh(double x) { return std::tanh(x); }
};

// The three solvers agree with the cell's steps in fp64, those that are parallel in time where they don't give up.
template <template <typename> typename Cell, typename T> void check_gated(CellKind kind) {
  using C = Accumulator<T>;
  constexpr int kStates = Cell<Plain>::kStates, kWeights = Cell<Plain>::kWeights;
  constexpr int64_t steps = 200;
  for (int64_t H : {1, 3, 8, 13}) {
    auto u = random<T>(steps * 3 * H);
    auto weights = random<C>(kWeights * H, 0.3);
    std::vector<T> h[2] = {room<T>(steps * H), room<T>(steps * H)};
    std::vector<int32_t> passes(H);
    Series along{nullptr, 0, H, 0, 0};
    GatedRecurrenceArgs args{kind, {nullptr, 1, steps}, {u.data(), 0, 3 * H, H, 0}, weights.data(), {}, {along, along},
                             passes.data(), H, dtype_of<T>()};
    for (int i = 0; i < 2; ++i) args.states[i].data = h[i].data();
    auto check = [&](const char* solver) {
      for (int64_t c = 0; c < H; ++c) {
        if (passes[c] < 0) continue;
        Cell<Plain> cell;
        for (int i = 0; i < kWeights; ++i) cell.w[i] = weights[i * H + c];
        double state[kStates] = {};
        for (int64_t t = 0; t < steps; ++t) {
          double now[3];
          for (int i = 0; i < 3; ++i) now[i] = number(u[(t * 3 + i) * H + c]);
          cell.step(now, state);
          for (int i = 0; i < kStates; ++i) {
            double got = number(h[i][t * H + c]);
            expect(near(got, state[i], tolerance<T>(4 + std::fabs(state[i]))), "%s H=%ld t=%ld: %g of %g", solver, H,
                   t, got, state[i]);
          }
        }
      }
    };
    kernel::gated_recurrence(args, {0, 1}, {0, H});
    check("sequential");
    TimePlan plan = time_plan(steps, kRowBytes / int64_t(sizeof(C)), H);
    std::vector<double> scratch(kRowBytes / 8 * std::max(shooting_rows(kStates), newton_rows(kStates, plan.length)) + 8);
    void* rows = scratch.data();
    for (int64_t c = 0; c < H; c += plan.channels)
      kernel::gated_recurrence_by_shooting(args, 0, {c, std::min(H, c + plan.channels)}, rows);
    check("shooting");
    for (int64_t c = 0; c < H; c += plan.channels)
      kernel::gated_recurrence_by_newton(args, 0, {c, std::min(H, c + plan.channels)}, rows);
    check("newton");
  }
}

}  // namespace

int main() {
  bool bf16_products = cpu_features().fast_bf16;
  std::printf("bf16 products: %s\n", bf16_products ? "yes" : "no");
  run("halves", [] { check_halves<bf16>(), check_halves<f16>(); });
  run("bf16 rows", [] { bf16_panels(random<float>(7 * 91), 7, 91, 1); });
  run("integers", [] { check_integers<float>(), check_integers<bf16>(), check_integers<f16>(); });
  if (bf16_products)
    run("bf16 panels", [] { check_bf16_panels<float>(), check_bf16_panels<bf16>(), check_bf16_panels<f16>(); });
  run("filter", [] {
    for (bool absolute : {false, true}) check_filter<float>(absolute), check_filter<double>(absolute);
  });
  run("screen", [&] {
    for (bool absolute : {false, true}) {
      check_screen(true, absolute);
      if (bf16_products) check_screen(false, absolute);
    }
  });
  run("sparse products", [] { each_type([](auto tag) { check_sparse_products<decltype(tag)>(); }); });
  run("linear recurrence", [] { each_type([](auto tag) { check_linear_recurrence<decltype(tag)>(); }); });
  run("gated recurrences", [] {
    check_gated<GruCell, float>(CellKind::gru), check_gated<GruCell, double>(CellKind::gru);
    check_gated<LstmCell, float>(CellKind::lstm), check_gated<LstmCell, f16>(CellKind::lstm);
  });
  std::printf("%lld failures\n", static_cast<long long>(failures));
  return failures > 0;
}
