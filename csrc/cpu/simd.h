// Vectors of one instruction-set level, on the compilers' portable vector types; intrinsics only where those have
// no word for it (comparison masks, half precision).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "dtype.h"

namespace fastsparse::FASTSPARSE_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <typename C> inline constexpr int kLanes = kVectorBytes / sizeof(C);

template <typename C> struct VectorOf;
template <> struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
};
template <> struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t bits __attribute__((vector_size(kVectorBytes)));
};
template <typename C> using Vector = typename VectorOf<C>::type;

typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

template <typename C> inline Vector<C> broadcast(C value) { return value - Vector<C>{}; }

// ---- scalars ----

inline float to_float(float value) { return value; }
inline double to_float(double value) { return value; }
inline float to_float(bf16 value) {
  uint32_t word = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &word, 4);
  return result;
}
inline float to_float(f16 value) {
  // Exponent and mantissa are shifted into place and rebiased; subnormals are so many 2^-24. No number on the way is
  // subnormal in fp32, where it might be taken for 0.
  uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13, sign = uint32_t(value.bits & 0x8000) << 16;
  if (magnitude >= 0x0f800000) magnitude = (magnitude & 0x007fffff) | 0x7f800000;  // Inf, NaN
  else if (magnitude >= 0x00800000) magnitude += 112 << 23;
  else {
    float scaled = float(magnitude >> 13) * 0x1p-24f;
    std::memcpy(&magnitude, &scaled, 4);
  }
  magnitude |= sign;
  float result;
  std::memcpy(&result, &magnitude, 4);
  return result;
}

inline void from_float(float value, float& out) { out = value; }
inline void from_float(double value, double& out) { out = value; }
inline void from_float(float value, bf16& out) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  out.bits = value != value ? 0x7fc0 : uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
}
inline void from_float(float value, f16& out) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  uint16_t sign = uint16_t(word >> 16 & 0x8000);
  word &= 0x7fffffff;
  if (word > 0x7f800000) out.bits = 0x7e00;         // NaN
  else if (word >= 0x477ff000) out.bits = sign | 0x7c00;  // 65520 and above round to infinity
  else if (word >= 0x38800000) out.bits = sign | uint16_t((word - 0x38000000 + 0xfff + (word >> 13 & 1)) >> 13);
  else {  // subnormal: adding 0.5 lines the mantissa up with the last bit, and rounds
    float shifted;
    std::memcpy(&shifted, &word, 4);
    shifted += 0.5f;
    std::memcpy(&word, &shifted, 4);
    out.bits = sign | uint16_t(word - 0x3f000000);
  }
}

// ---- vectors ----

inline Vector<float> load(const float* from) {
  Vector<float> result;
  std::memcpy(&result, from, sizeof result);
  return result;
}
inline Vector<double> load(const double* from) {
  Vector<double> result;
  std::memcpy(&result, from, sizeof result);
  return result;
}
// GCC splits 512-bit conversions between 16 and 32 bits in two, hence the intrinsics.
inline Words widen(Halves halves) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32((__m256i)halves);
#else
  return __builtin_convertvector(halves, Words);
#endif
}
inline Halves narrow(Words words) {
#if defined(__AVX512F__)
  return (Halves)_mm512_cvtepi32_epi16((__m512i)words);
#else
  return __builtin_convertvector(words, Halves);
#endif
}
inline Vector<float> load(const bf16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return (Vector<float>)(widen(halves) << 16);
}
inline Vector<float> load(const f16* from) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__aarch64__)
  float16x4_t halves;
  std::memcpy(&halves, from, sizeof halves);
  return (Vector<float>)vcvt_f32_f16(halves);
#else
  using Bits = VectorOf<float>::bits;
  // to_float for all lanes; signed, since SSE2 has neither comparisons nor conversions of others.
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  Bits bits = (Bits)widen(halves), magnitude = (bits & 0x7fff) << 13;
  Vector<float> subnormal = __builtin_convertvector(bits & 0x7fff, Vector<float>) * 0x1p-24f;
  Bits normal = magnitude + (112 << 23), special = magnitude + (224 << 23);
  Bits wide = magnitude >= 0x0f800000 ? special : magnitude >= 0x00800000 ? normal : (Bits)subnormal;
  return (Vector<float>)(wide | (bits & 0x8000) << 16);
#endif
}

// A vector of which only `left` elements may be read, if they are fewer; the other lanes are 0.
template <typename T> inline Vector<Accumulator<T>> load_up_to(const T* from, int64_t left) {
  constexpr int lanes = kLanes<Accumulator<T>>;
  if (left >= lanes) return load(from);
  T part[lanes] = {};
  std::memcpy(static_cast<void*>(part), from, left * sizeof(T));
  return load(part);
}

inline void store(Vector<float> value, float* to) { std::memcpy(to, &value, sizeof value); }
inline void store(Vector<double> value, double* to) { std::memcpy(to, &value, sizeof value); }
inline void store(Vector<float> value, bf16* to) {  // round to nearest, ties to even; NaN stays NaN
  Words words = (Words)value;
  Words rounded = (words + 0x7fff + (words >> 16 & 1)) >> 16;
  Words number = (Words)(value == value);
  Halves halves = narrow((number & rounded) | (~number & 0x7fc0));
  std::memcpy(to, &halves, sizeof halves);
}
inline void store(Vector<float> value, f16* to) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  float16x4_t halves = vcvt_f16_f32((float32x4_t)value);  // to nearest: edge/float_mode.h sees to that
  std::memcpy(to, &halves, sizeof halves);
#else
  using Bits = VectorOf<float>::bits;
  Bits word = (Bits)value, sign = word >> 16 & 0x8000;  // from_float for all lanes
  word &= 0x7fffffff;
  Bits normal = (word - 0x38000000 + 0xfff + (word >> 13 & 1)) >> 13;
  Bits subnormal = (Bits)((Vector<float>)word + 0.5f) - 0x3f000000;
  Bits finite = word >= 0x38800000 ? normal : subnormal;
  Bits narrowed = word >= 0x477ff000 ? Bits{} + 0x7c00 : finite;
  Halves halves = narrow((Words)(word > 0x7f800000 ? Bits{} + 0x7e00 : narrowed | sign));
  std::memcpy(to, &halves, sizeof halves);
#endif
}

// Halves are added up as vectors: from an array of lanes compilers read and write memory in every step.
template <typename V> inline auto sum_of_lanes(V value) {
  using C = std::remove_cvref_t<decltype(value[0])>;
  constexpr int lanes = sizeof value / sizeof(C);
  if constexpr (lanes == 2) {
    return C(value[0] + value[1]);
  } else {
    typedef C Half __attribute__((vector_size(sizeof value / 2)));
    Half halves[2];
    std::memcpy(halves, &value, sizeof value);
    return sum_of_lanes<Half>(halves[0] + halves[1]);
  }
}
template <typename C> inline C sum(Vector<C> value) { return sum_of_lanes<Vector<C>>(value); }

inline Vector<float> absolute(Vector<float> value) { return (Vector<float>)((Words)value & 0x7fffffff); }
inline Vector<double> absolute(Vector<double> value) {
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
  return (Vector<double>)((Bits)value & 0x7fffffffffffffff);
}
// The larger of the two; `floor` where `value` is NaN.
template <typename V> inline V at_least(V value, V floor) { return value > floor ? value : floor; }

// not_below: bit i is set where !(a[i] < b[i]); not_at_most: where !(a[i] <= b[i]). Both also where either is NaN.
#if defined(__AVX512F__)
#define FASTSPARSE_MASK(C, letter, relation, code) return _mm512_cmp_p##letter##_mask((__m512##C)a, (__m512##C)b, code);
#elif defined(__AVX2__)
#define FASTSPARSE_MASK(C, letter, relation, code) \
  return uint32_t(_mm256_movemask_p##letter(_mm256_cmp_p##letter((__m256##C)a, (__m256##C)b, code)));
#elif defined(__aarch64__)
template <typename Lanes> inline uint32_t mask_of(Lanes lanes) {  // of lanes that are 0 or -1
  if constexpr (sizeof lanes[0] == 4) return vaddvq_u32((uint32x4_t)lanes & uint32x4_t{1, 2, 4, 8});
  else return uint32_t(vaddvq_u64((uint64x2_t)lanes & uint64x2_t{1, 2}));
}
#define FASTSPARSE_MASK(C, letter, relation, code) return mask_of(~(a relation b));
#else
#define FASTSPARSE_MASK(C, letter, relation, code)                                               \
  uint32_t mask = 0;                                                                             \
  for (int i = 0; i < int(sizeof a / sizeof a[0]); ++i) mask |= uint32_t(!(a[i] relation b[i])) << i; \
  return mask;
#endif
inline uint32_t not_below(Vector<float> a, Vector<float> b) { FASTSPARSE_MASK(, s, <, _CMP_NLT_UQ) }
inline uint32_t not_below(Vector<double> a, Vector<double> b) { FASTSPARSE_MASK(d, d, <, _CMP_NLT_UQ) }
inline uint32_t not_at_most(Vector<float> a, Vector<float> b) { FASTSPARSE_MASK(, s, <=, _CMP_NLE_UQ) }
inline uint32_t not_at_most(Vector<double> a, Vector<double> b) { FASTSPARSE_MASK(d, d, <=, _CMP_NLE_UQ) }
#undef FASTSPARSE_MASK

// Writes the lanes whose bit is set one after another; a whole vector behind `to` may be overwritten.
inline void compress(Vector<float> value, uint32_t mask, float* to) {
#if defined(__AVX512F__)
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(__mmask16(mask), (__m512)value));
#else
  for (; mask; mask &= mask - 1) *to++ = value[__builtin_ctz(mask)];
#endif
}
inline void compress(Vector<double> value, uint32_t mask, double* to) {
#if defined(__AVX512F__)
  _mm512_storeu_pd(to, _mm512_maskz_compress_pd(__mmask8(mask), (__m512d)value));
#else
  for (; mask; mask &= mask - 1) *to++ = value[__builtin_ctz(mask)];
#endif
}
// The same of a vector of 16 or fewer consecutive integers from `first` on.
inline void compress_consecutive(int32_t first, uint32_t mask, int32_t* to) {
#if defined(__AVX512F__)
  const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(__mmask16(mask), _mm512_add_epi32(_mm512_set1_epi32(first), steps)));
#else
  for (; mask; mask &= mask - 1) *to++ = first + __builtin_ctz(mask);
#endif
}

// Into the second level of the cache, or the first.
template <bool First = false, typename T> inline void prefetch(const T* address) {
  __builtin_prefetch(address, 0, First ? 3 : 2);
}

}  // namespace fastsparse::FASTSPARSE_ISA
