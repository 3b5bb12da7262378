// Several vectors as one number, and sigmoid and tanh of it: what csrc/cells.h computes with on a CPU.
//
// exp(y) = s (1 + f), where s = 2^n with n the integer nearest to y / ln 2, and f = exp(r) - 1 of the rest r:
//   sigmoid(x) = 1 / (s f + (s + 1)) with y = -x,    tanh(x) = (s f + (s - 1)) / (s f + (s + 1)) with y = 2 x.
// No branch, nothing that cancels, and where y is near 0, so that s is 1, relative precision. NaN stays NaN; sigmoid is
// 0 where it would be less than a normal number. Measured against twice the precision, over 2^26 fp32 and 2^21 fp64
// numbers of all sizes, sigmoid is off by at most 2.5 ulp and tanh by 2.9 (tests/test_gated_recurrences.py allows 4).
#pragma once

#include <type_traits>

#include "inline.h"
#include "cpu/simd.h"

namespace fastsparse::FASTSPARSE_ISA {

// K vectors that go one way: each waits for its own last step, and their waits overlap.
template <typename C, int K> struct Pack {
  static_assert(K == 1 || K == 2 || K == 4);
  Vector<C> v[K];

  // Calls f(0), f(1), ... Not a loop: GCC unrolls loops late, and drags their arrays through most of its passes, which
  // took twice as long.
  template <typename F> static FASTSPARSE_INLINE void each(const F& f) {
    f(0);
    if constexpr (K > 1) f(1);
    if constexpr (K > 2) f(2), f(3);
  }
  // The pack of f(0), f(1), ...
  template <typename F> static FASTSPARSE_INLINE Pack of(const F& f) {
    Pack result;
    each([&](int k) __attribute__((always_inline)) { result.v[k] = f(k); });
    return result;
  }

#define FASTSPARSE_OPERATOR(op)                                                          \
  friend FASTSPARSE_INLINE Pack operator op(const Pack& a, const Pack& b) {              \
    return of([&](int k) __attribute__((always_inline)) { return a.v[k] op b.v[k]; });   \
  }                                                                                      \
  friend FASTSPARSE_INLINE Pack operator op(const Pack& a, C b) { return a op Pack(b); } \
  friend FASTSPARSE_INLINE Pack operator op(C a, const Pack& b) { return Pack(a) op b; }
  FASTSPARSE_OPERATOR(+)
  FASTSPARSE_OPERATOR(-)
  FASTSPARSE_OPERATOR(*)
#undef FASTSPARSE_OPERATOR
  friend FASTSPARSE_INLINE Pack operator-(const Pack& a) {
    return of([&](int k) __attribute__((always_inline)) { return -a.v[k]; });
  }
  FASTSPARSE_INLINE Pack& operator+=(const Pack& other) { return *this = *this + other; }
  FASTSPARSE_INLINE Pack& operator*=(const Pack& other) { return *this = *this * other; }

  Pack() = default;
  FASTSPARSE_INLINE explicit Pack(C value) {
    each([&](int k) __attribute__((always_inline)) { v[k] = broadcast(value); });
  }
};

template <typename C> struct ExpConstants;

template <> struct ExpConstants<float> {
  static constexpr int kMantissa = 23;
  static constexpr float kLand = 0x1.8p23f + 127;  // a sum with it has n in its low bits, as an exponent
  static constexpr float kLog2E = 0x1.715476p+0f;
  static constexpr float kLn2 = 0x1.62e4p-1f, kLn2Rest = 0x1.7f7d1cp-20f;  // n kLn2 is exact
  // (exp(r) - 1 - r) / r^2 where |r| <= ln 2 / 2, by Remez' algorithm: exp(r) - 1 to a tenth of an ulp.
  static constexpr float kSeries[] = {0x1.6bec08p-10f, 0x1.122776p-7f, 0x1.555674p-5f, 0x1.5554b0p-3f, 0x1.fffffep-2f};
  static constexpr float kMostSigmoid = 80, kLeastSigmoid = -87.33655f;  // 1 from here on; below 2^-126 before it
  static constexpr float kMostTanh = 10;                                  // 1 from here on
};

template <> struct ExpConstants<double> {
  static constexpr int kMantissa = 52;
  static constexpr double kLand = 0x1.8p52 + 1023;
  static constexpr double kLog2E = 0x1.71547652b82fep+0;
  static constexpr double kLn2 = 0x1.62e42fefa3800p-1, kLn2Rest = 0x1.ef35793c76730p-45;
  static constexpr double kSeries[] = {0x1.ae6bab1e06381p-26, 0x1.28a1dff795364p-22, 0x1.71de8804b31b7p-19,
                                       0x1.a019a76f4a708p-16, 0x1.a01a017515ccfp-13, 0x1.6c16c17edba85p-10,
                                       0x1.1111111118fa8p-7,  0x1.55555555522b8p-5,  0x1.5555555555539p-3,
                                       0x1.0000000000005p-1};
  static constexpr double kMostSigmoid = 700, kLeastSigmoid = -708.3964185, kMostTanh = 20;
};

// The numbers of csrc/cells.h: K vectors of C.
template <typename C, int K> struct Activations {
  using V = Pack<C, K>;

  static FASTSPARSE_INLINE V sigmoid(V x) {
    const Vector<C> most = broadcast(Constants::kMostSigmoid);
    x = V::of([&](int k) __attribute__((always_inline)) { return at_most(x.v[k], most); });
    Power power = exponential(-x);
    V denominator = power.scale * power.rest + (power.scale + 1);
    return V::of([&](int k) __attribute__((always_inline)) {
      return x.v[k] < Constants::kLeastSigmoid ? Vector<C>{} : reciprocal(denominator.v[k]);
    });
  }

  static FASTSPARSE_INLINE V tanh(V x) {
    const Vector<C> most = broadcast(Constants::kMostTanh);
    x = V::of([&](int k) __attribute__((always_inline)) { return -at_most(-at_most(x.v[k], most), most); });
    Power power = exponential(x + x);
    V numerator = power.scale * power.rest + (power.scale - 1);
    V denominator = power.scale * power.rest + (power.scale + 1);
    return V::of([&](int k) __attribute__((always_inline)) { return quotient(numerator.v[k], denominator.v[k]); });
  }

 private:
  using Constants = ExpConstants<C>;
  struct Power { V scale, rest; };  // exp(y) = scale (1 + rest)

  static FASTSPARSE_INLINE Power exponential(const V& y) {
    V landed = y * Constants::kLog2E + Constants::kLand;
    V n = landed - Constants::kLand;
    V r = y - n * Constants::kLn2 - n * Constants::kLn2Rest;
    V series(Constants::kSeries[0]);
#pragma GCC unroll 16
    for (size_t i = 1; i < sizeof Constants::kSeries / sizeof(C); ++i) series = series * r + Constants::kSeries[i];
    Power power;
    power.rest = (r * r) * series + r;
    power.scale = V::of([&](int k) __attribute__((always_inline)) {
      return (Vector<C>)((typename VectorOf<C>::bits)landed.v[k] << Constants::kMantissa);
    });
    return power;
  }

  // NaN where `value` is. (GCC makes two instructions of the plain form.)
  static FASTSPARSE_INLINE Vector<C> at_most(Vector<C> value, Vector<C> most) {
#if defined(__AVX512F__)
    if constexpr (sizeof(C) == 4) return (Vector<C>)_mm512_min_ps((__m512)most, (__m512)value);
    else return (Vector<C>)_mm512_min_pd((__m512d)most, (__m512d)value);
#else
    return most < value ? most : value;
#endif
  }

  // Both to within 0.6 ulp. AVX-512 has an estimate to 2^-14, and a step of Newton's method from there costs a third of
  // a division (Zen 4). Its remainders must not be rounded before they are used: hence the fused operations by name.
  static FASTSPARSE_INLINE Vector<C> reciprocal(Vector<C> divisor) {
#if defined(__AVX512F__)
    if constexpr (sizeof(C) == 4) {
      __m512 d = (__m512)divisor, estimate = _mm512_rcp14_ps(d);
      return (Vector<C>)_mm512_fmadd_ps(estimate, _mm512_fnmadd_ps(d, estimate, _mm512_set1_ps(1)), estimate);
    }
#endif
    return 1 / divisor;
  }
  static FASTSPARSE_INLINE Vector<C> quotient(Vector<C> dividend, Vector<C> divisor) {
#if defined(__AVX512F__)
    if constexpr (sizeof(C) == 4) {
      __m512 d = (__m512)divisor, estimate = _mm512_rcp14_ps(d);
      __m512 result = _mm512_mul_ps((__m512)dividend, estimate);
      return (Vector<C>)_mm512_fmadd_ps(estimate, _mm512_fnmadd_ps(d, result, (__m512)dividend), result);
    }
#endif
    return dividend / divisor;
  }
};

}  // namespace fastsparse::FASTSPARSE_ISA
