// CUDA C++ for the host compiler: what device code may use of it, on fibers of one CPU thread.
//
// Semantics are the CUDA C++ Programming Guide's, read strictly: what it calls undefined is an error here, or a value
// of all ones. Anything that isn't here isn't emulated, so code that needs it doesn't compile.
//
// Not found here: what depends on the hardware's weaker order of memory beyond the races that racecheck.cpp finds
// (fences do nothing), on the fusing of a product and a sum that isn't written as fmaf, on registers, or on time.
#pragma once

#include <math.h>
#include <stdio.h>

#include <bit>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <tuple>
#include <type_traits>
#include <utility>

#include "dtype.h"

#define __global__
#define __device__
#define __host__
#ifdef __SANITIZE_ADDRESS__  // see csrc/inline.h
#define __forceinline__ inline
#else
#define __forceinline__ inline __attribute__((always_inline))
#endif
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
// The bound becomes that many no-ops in front of the kernel, where a launch can count them (see emulator.cpp); sizeof
// makes of any expression the literal that the attribute wants.
#define __launch_bounds__(threads, ...) \
  __attribute__((patchable_function_entry(sizeof(char[threads]), sizeof(char[threads]))))

// ---- vector types ----

#define FASTSPARSE_VECTORS(scalar, name, align2, align4)                                               \
  struct name##1 { scalar x; };                                                                        \
  struct alignas(align2) name##2 { scalar x, y; };                                                     \
  struct name##3 { scalar x, y, z; };                                                                  \
  struct alignas(align4) name##4 { scalar x, y, z, w; };                                               \
  inline name##1 make_##name##1(scalar x) { return {x}; }                                              \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                                 \
  inline name##3 make_##name##3(scalar x, scalar y, scalar z) { return {x, y, z}; }                    \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
FASTSPARSE_VECTORS(signed char, char, 2, 4)
FASTSPARSE_VECTORS(unsigned char, uchar, 2, 4)
FASTSPARSE_VECTORS(short, short, 4, 8)
FASTSPARSE_VECTORS(unsigned short, ushort, 4, 8)
FASTSPARSE_VECTORS(int, int, 8, 16)
FASTSPARSE_VECTORS(unsigned, uint, 8, 16)
FASTSPARSE_VECTORS(long long, longlong, 16, 16)
FASTSPARSE_VECTORS(unsigned long long, ulonglong, 16, 16)
FASTSPARSE_VECTORS(float, float, 8, 16)
FASTSPARSE_VECTORS(double, double, 16, 16)
#undef FASTSPARSE_VECTORS

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
// Raises where it takes from a kernel what it had: another thread may be about to launch with it.
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

// ---- the machine ----

namespace fastsparse::emulator {

using Place = std::source_location;

inline constexpr size_t kStaticSharedBytes = 48 << 10;   // of a block, as ptxas allows
inline constexpr size_t kSharedBytes = 99 << 10;         // of a block in all, on sm_86, 89 and 120: others have more

struct Builtins {
  uint3 thread, block;
  dim3 threads, blocks;
};
extern Builtins builtins;  // of the thread that runs

// Runs a grid, blocks one after another, in an order that the seed draws. Raises std::runtime_error, naming kernel,
// block, thread and seed, where the launch or a thread does what CUDA leaves undefined.
void run(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*thread)(void*),
         void* context);

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            Arguments... arguments) {
  struct Context {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  } context{kernel, {static_cast<Parameters>(arguments)...}};
  run(name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
      [](void* opaque) {
        auto& [kernel, parameters] = *static_cast<Context*>(opaque);
        std::apply(kernel, parameters);
      },
      &context);
}

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

enum class Sync : int { threads, threads_or, threads_and, threads_count };
int barrier(Sync kind, bool predicate, Place place);

enum class Warp : int {
  sync, shfl, shfl_up, shfl_down, shfl_xor, any, all, ballot, match_any, match_all,
  add, add_signed, min, min_signed, max, max_signed, bit_and, bit_or, bit_xor,
};
// What the lane gets of an op that all the lanes of `mask` join, each with a value; `source` is the lane that a shuffle
// reads from.
uint64_t collective(Warp kind, unsigned mask, uint64_t value, int source, Place place);
unsigned lane();
int shuffle_source(Warp kind, int operand, int width);

// A chance for the other threads to run before an access, none during it; racecheck is told that it is atomic.
void at_atomic(const void* address, size_t bytes);
void copy(void* to, const void* from, size_t bytes);
void check_alignment(const void* address, size_t alignment);

// The block's static shared memory of one type, told apart by `key`.
void* static_shared(const void* key, size_t bytes, size_t alignment);
void* dynamic_shared_memory();

template <typename T> T shuffle(Warp kind, unsigned mask, T value, int operand, int width, Place place) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  int source = shuffle_source(kind, operand, width);
  return std::bit_cast<T>(static_cast<Bits>(collective(kind, mask, std::bit_cast<Bits>(value), source, place)));
}

template <typename T, typename F> __forceinline__ T atomic(T* address, const F& update) {
  check_alignment(address, sizeof(T));
  at_atomic(address, sizeof(T));
  T before;
  copy(&before, address, sizeof(T));
  T after = static_cast<T>(update(before));
  copy(address, &after, sizeof(T));
  return before;
}

}  // namespace fastsparse::emulator

#define threadIdx (::fastsparse::emulator::builtins.thread)
#define blockIdx (::fastsparse::emulator::builtins.block)
#define blockDim (::fastsparse::emulator::builtins.threads)
#define gridDim (::fastsparse::emulator::builtins.blocks)
inline constexpr int warpSize = 32;

// ---- barriers, shuffles, votes ----

#define FASTSPARSE_PLACE ::fastsparse::emulator::Place place = ::fastsparse::emulator::Place::current()
#define FASTSPARSE_SYNC ::fastsparse::emulator::Sync
#define FASTSPARSE_WARP ::fastsparse::emulator::Warp

inline void __syncthreads(FASTSPARSE_PLACE) { ::fastsparse::emulator::barrier(FASTSPARSE_SYNC::threads, false, place); }
inline int __syncthreads_or(int predicate, FASTSPARSE_PLACE) {
  return ::fastsparse::emulator::barrier(FASTSPARSE_SYNC::threads_or, predicate != 0, place);
}
inline int __syncthreads_and(int predicate, FASTSPARSE_PLACE) {
  return ::fastsparse::emulator::barrier(FASTSPARSE_SYNC::threads_and, predicate != 0, place);
}
inline int __syncthreads_count(int predicate, FASTSPARSE_PLACE) {
  return ::fastsparse::emulator::barrier(FASTSPARSE_SYNC::threads_count, predicate != 0, place);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, FASTSPARSE_PLACE) {
  ::fastsparse::emulator::collective(FASTSPARSE_WARP::sync, mask, 0, 0, place);
}
inline int __any_sync(unsigned mask, int predicate, FASTSPARSE_PLACE) {
  return int(::fastsparse::emulator::collective(FASTSPARSE_WARP::any, mask, predicate != 0, 0, place));
}
inline int __all_sync(unsigned mask, int predicate, FASTSPARSE_PLACE) {
  return int(::fastsparse::emulator::collective(FASTSPARSE_WARP::all, mask, predicate != 0, 0, place));
}
inline unsigned __ballot_sync(unsigned mask, int predicate, FASTSPARSE_PLACE) {
  return unsigned(::fastsparse::emulator::collective(FASTSPARSE_WARP::ballot, mask, predicate != 0, 0, place));
}
// Which lanes happen to run together is the hardware's whim: nothing right can depend on it.
unsigned __activemask() = delete;

#define FASTSPARSE_OF_32_AND_64_BITS(define) \
  define(int) define(unsigned) define(long) define(unsigned long) define(long long) define(unsigned long long) \
  define(float) define(double)

#define FASTSPARSE_SHUFFLES(T)                                                                                        \
  inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, FASTSPARSE_PLACE) {                        \
    return ::fastsparse::emulator::shuffle(FASTSPARSE_WARP::shfl, mask, value, source, width, place);                \
  }                                                                                                                   \
  inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, FASTSPARSE_PLACE) {                 \
    return ::fastsparse::emulator::shuffle(FASTSPARSE_WARP::shfl_up, mask, value, int(delta), width, place);         \
  }                                                                                                                   \
  inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, FASTSPARSE_PLACE) {               \
    return ::fastsparse::emulator::shuffle(FASTSPARSE_WARP::shfl_down, mask, value, int(delta), width, place);       \
  }                                                                                                                   \
  inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, FASTSPARSE_PLACE) {                     \
    return ::fastsparse::emulator::shuffle(FASTSPARSE_WARP::shfl_xor, mask, value, lanes, width, place);             \
  }
FASTSPARSE_OF_32_AND_64_BITS(FASTSPARSE_SHUFFLES)
#undef FASTSPARSE_SHUFFLES

#define FASTSPARSE_MATCHES(T)                                                                                         \
  inline unsigned __match_any_sync(unsigned mask, T value, FASTSPARSE_PLACE) {                                        \
    return unsigned(::fastsparse::emulator::match(FASTSPARSE_WARP::match_any, mask, value, place));                \
  }                                                                                                                   \
  inline unsigned __match_all_sync(unsigned mask, T value, int* agree, FASTSPARSE_PLACE) {                            \
    unsigned lanes = unsigned(::fastsparse::emulator::match(FASTSPARSE_WARP::match_all, mask, value, place));      \
    *agree = lanes != 0;                                                                                              \
    return lanes;                                                                                                     \
  }
namespace fastsparse::emulator {
// A match compares bits.
template <typename T> uint64_t match(Warp kind, unsigned mask, T value, Place place) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  return collective(kind, mask, std::bit_cast<Bits>(value), 0, place);
}
}  // namespace fastsparse::emulator
FASTSPARSE_OF_32_AND_64_BITS(FASTSPARSE_MATCHES)
#undef FASTSPARSE_MATCHES
#undef FASTSPARSE_OF_32_AND_64_BITS

#define FASTSPARSE_REDUCE(name, T, kind)                                                                    \
  inline T __reduce_##name##_sync(unsigned mask, T value, FASTSPARSE_PLACE) {                               \
    return T(::fastsparse::emulator::collective(FASTSPARSE_WARP::kind, mask, unsigned(value), 0, place));  \
  }
FASTSPARSE_REDUCE(add, unsigned, add) FASTSPARSE_REDUCE(add, int, add_signed)
FASTSPARSE_REDUCE(min, unsigned, min) FASTSPARSE_REDUCE(min, int, min_signed)
FASTSPARSE_REDUCE(max, unsigned, max) FASTSPARSE_REDUCE(max, int, max_signed)
FASTSPARSE_REDUCE(and, unsigned, bit_and)
FASTSPARSE_REDUCE(or, unsigned, bit_or)
FASTSPARSE_REDUCE(xor, unsigned, bit_xor)
#undef FASTSPARSE_REDUCE
#undef FASTSPARSE_PLACE
#undef FASTSPARSE_SYNC
#undef FASTSPARSE_WARP

// Order of memory between threads comes from barriers alone here: a protocol of flags and fences isn't recognised.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

// ---- atomics, for the types that CUDA has them for ----

#define FASTSPARSE_ATOMIC(name, T, expression)                                       \
  __forceinline__ T atomic##name(T* address, T value) {                                       \
    return ::fastsparse::emulator::atomic(address, [=](T old) { return expression; }); \
  }
#define FASTSPARSE_ATOMIC_INTEGERS(name, expression)    \
  FASTSPARSE_ATOMIC(name, int, expression)              \
  FASTSPARSE_ATOMIC(name, unsigned, expression)         \
  FASTSPARSE_ATOMIC(name, unsigned long long, expression)
FASTSPARSE_ATOMIC(Add, int, int(unsigned(old) + unsigned(value)))
FASTSPARSE_ATOMIC(Add, unsigned, old + value)
FASTSPARSE_ATOMIC(Add, unsigned long long, old + value)
FASTSPARSE_ATOMIC(Add, float, old + value)
FASTSPARSE_ATOMIC(Add, double, old + value)
FASTSPARSE_ATOMIC(Sub, int, int(unsigned(old) - unsigned(value)))
FASTSPARSE_ATOMIC(Sub, unsigned, old - value)
FASTSPARSE_ATOMIC_INTEGERS(Max, old > value ? old : value)
FASTSPARSE_ATOMIC(Max, long long, old > value ? old : value)
FASTSPARSE_ATOMIC_INTEGERS(Min, old < value ? old : value)
FASTSPARSE_ATOMIC(Min, long long, old < value ? old : value)
FASTSPARSE_ATOMIC_INTEGERS(Exch, (static_cast<void>(old), value))
FASTSPARSE_ATOMIC(Exch, float, (static_cast<void>(old), value))
FASTSPARSE_ATOMIC_INTEGERS(And, old & value)
FASTSPARSE_ATOMIC_INTEGERS(Or, old | value)
FASTSPARSE_ATOMIC_INTEGERS(Xor, old ^ value)
FASTSPARSE_ATOMIC(Inc, unsigned, old >= value ? 0 : old + 1)
FASTSPARSE_ATOMIC(Dec, unsigned, old == 0 || old > value ? value : old - 1)
#undef FASTSPARSE_ATOMIC_INTEGERS
#undef FASTSPARSE_ATOMIC

#define FASTSPARSE_CAS(T)                                                                                \
  __forceinline__ T atomicCAS(T* address, T compare, T value) {                                          \
    return ::fastsparse::emulator::atomic(address, [=](T old) { return old == compare ? value : old; }); \
  }
FASTSPARSE_CAS(int) FASTSPARSE_CAS(unsigned) FASTSPARSE_CAS(unsigned long long) FASTSPARSE_CAS(unsigned short)
#undef FASTSPARSE_CAS

// ---- bits ----

inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __popcll(unsigned long long bits) { return std::popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
inline int __clz(int bits) { return std::countl_zero(unsigned(bits)); }
inline int __clzll(long long bits) { return std::countl_zero(static_cast<unsigned long long>(bits)); }
inline unsigned long long __brevll(unsigned long long bits) {
  bits = (bits >> 1 & 0x5555555555555555u) | (bits & 0x5555555555555555u) << 1;
  bits = (bits >> 2 & 0x3333333333333333u) | (bits & 0x3333333333333333u) << 2;
  bits = (bits >> 4 & 0x0f0f0f0f0f0f0f0fu) | (bits & 0x0f0f0f0f0f0f0f0fu) << 4;
  return __builtin_bswap64(bits);
}
inline unsigned __brev(unsigned bits) { return unsigned(__brevll(bits) >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }

// ---- arithmetic ----

#define FASTSPARSE_MIN_MAX(A, B, T)                                       \
  inline T min(A a, B b) { T x = static_cast<T>(a), y = static_cast<T>(b); return x < y ? x : y; } \
  inline T max(A a, B b) { T x = static_cast<T>(a), y = static_cast<T>(b); return x > y ? x : y; }
#define FASTSPARSE_MIN_MAX_SIGNS(T)                                                       \
  FASTSPARSE_MIN_MAX(T, T, T) FASTSPARSE_MIN_MAX(unsigned T, unsigned T, unsigned T)      \
  FASTSPARSE_MIN_MAX(T, unsigned T, unsigned T) FASTSPARSE_MIN_MAX(unsigned T, T, unsigned T)
FASTSPARSE_MIN_MAX_SIGNS(int)
FASTSPARSE_MIN_MAX_SIGNS(long)
FASTSPARSE_MIN_MAX_SIGNS(long long)
#undef FASTSPARSE_MIN_MAX_SIGNS
#undef FASTSPARSE_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(float a, double b) { return fmin(a, b); }
inline double max(float a, double b) { return fmax(a, b); }
inline double min(double a, float b) { return fmin(a, b); }
inline double max(double a, float b) { return fmax(a, b); }

inline float rsqrtf(float value) { return 1 / sqrtf(value); }
inline double rsqrt(double value) { return 1 / sqrt(value); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return sqrt(a); }

namespace fastsparse::emulator {
// An fp32 result that is exact in fp64, or rounded there by less than fp32's last bit, rounded up or down. The sum and
// product of two floats err in fp64 by less than half its last bit, and that error's sign decides which float is next.
inline float directed(double rounded, double error, bool up) {
  float nearest = float(rounded);
  double missing = (rounded - double(nearest)) + error;
  if (isinf(rounded) || isnan(rounded)) return nearest;
  if (up && missing > 0) return nextafterf(nearest, INFINITY);
  if (!up && missing < 0) return nextafterf(nearest, -INFINITY);
  return nearest;
}
inline float add_directed(float a, float b, bool up) {
  double sum = double(a) + b, part = sum - a;
  return directed(sum, (a - (sum - part)) + (b - part), up);  // two-sum (Knuth): the sum's error, exactly
}
inline float multiply_directed(float a, float b, bool up) { return directed(double(a) * b, 0, up); }
}  // namespace fastsparse::emulator
inline float __fadd_ru(float a, float b) { return ::fastsparse::emulator::add_directed(a, b, true); }
inline float __fadd_rd(float a, float b) { return ::fastsparse::emulator::add_directed(a, b, false); }
inline float __fsub_ru(float a, float b) { return ::fastsparse::emulator::add_directed(a, -b, true); }
inline float __fsub_rd(float a, float b) { return ::fastsparse::emulator::add_directed(a, -b, false); }
inline float __fmul_ru(float a, float b) { return ::fastsparse::emulator::multiply_directed(a, b, true); }
inline float __fmul_rd(float a, float b) { return ::fastsparse::emulator::multiply_directed(a, b, false); }

// ---- memory ----

// Loads and stores with a hint to the caches: for scalars and vector types alone, as in CUDA.
namespace fastsparse::emulator {
template <typename T> concept Word = std::is_trivially_copyable_v<T> && (sizeof(T) & (sizeof(T) - 1)) == 0 &&
                                     sizeof(T) <= 16;
}
#define FASTSPARSE_LOAD(name)                                                                         \
  template <::fastsparse::emulator::Word T>                                                          \
  inline T name(const T* address) {                                                                   \
    ::fastsparse::emulator::check_alignment(address, sizeof(T));                                      \
    return *address;                                                                                  \
  }
FASTSPARSE_LOAD(__ldg) FASTSPARSE_LOAD(__ldca) FASTSPARSE_LOAD(__ldcg) FASTSPARSE_LOAD(__ldcs) FASTSPARSE_LOAD(__ldlu)
#undef FASTSPARSE_LOAD
#define FASTSPARSE_STORE(name)                                                                                       \
  template <::fastsparse::emulator::Word T>                                                                         \
  inline void name(T* address, std::type_identity_t<T> value) {                                       \
    ::fastsparse::emulator::check_alignment(address, sizeof(T));                                      \
    *address = value;                                                                                                \
  }
FASTSPARSE_STORE(__stwb) FASTSPARSE_STORE(__stcg) FASTSPARSE_STORE(__stcs) FASTSPARSE_STORE(__stwt)
#undef FASTSPARSE_STORE

inline void __nanosleep(unsigned) { ::fastsparse::emulator::at_atomic(nullptr, 0); }
[[noreturn]] inline void __trap() { ::fastsparse::emulator::fail("__trap()"); }

// ---- what csrc/cuda/device.cuh adds ----

namespace fastsparse::cuda {

template <typename T> T& shared_storage() {
  static_assert(std::is_trivially_destructible_v<T>);
  static constexpr char key = 0;
  return *static_cast<T*>(emulator::static_shared(&key, sizeof(T), alignof(T) < 16 ? 16 : alignof(T)));
}
template <typename T> T* dynamic_shared() { return static_cast<T*>(emulator::dynamic_shared_memory()); }

inline void assume_aligned_packet(const void* address) { emulator::check_alignment(address, 16); }

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(bf16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }
inline float widen(f16 value) {
  uint32_t sign = uint32_t(value.bits & 0x8000) << 16, rest = uint32_t(value.bits & 0x7fff) << 13;
  if (rest >= 0x7c00u << 13) return __uint_as_float(sign | (rest + (112u << 23)) | 0x7f800000u);  // infinite, NaN
  // Scaled by 2^112, which shifts fp16's exponent to fp32's and makes subnormals normal, exactly.
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest) * 0x1p112f));
}

// csrc/cuda/tensor_cores.cuh says what a lane holds. Sums are exact, but for one rounding. Lanes read one another's
// operands where these are, until all have.
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         emulator::Place place = emulator::Place::current()) {
  auto of_lane = [&](const void* mine, int lane) {
    auto address = reinterpret_cast<uint64_t>(mine);
    return reinterpret_cast<const void*>(emulator::shuffle(emulator::Warp::shfl, ~0u, address, lane, 32, place));
  };
  int row = int(emulator::lane()) / 4, column = int(emulator::lane()) % 4 * 2;
  double sums[4] = {c[0], c[1], c[2], c[3]};
  for (int pair = 0; pair < 4; ++pair) {
    uint32_t left[4];
    emulator::copy(left, of_lane(a, row * 4 + pair), sizeof left);
    for (int next = 0; next < 2; ++next) {
      uint32_t right[2];
      emulator::copy(right, of_lane(b, (column + next) * 4 + pair), sizeof right);
      for (int at = 0; at < 4; ++at)
        for (int half = 0; half < 2; ++half)
          sums[at % 2 * 2 + next] += double(widen(bf16{uint16_t(left[at] >> 16 * half)})) *
                                     double(widen(bf16{uint16_t(right[at / 2] >> 16 * half)}));
    }
  }
  __syncwarp(~0u, place);
  for (int at = 0; at < 4; ++at) c[at] = float(sums[at]);
}

template <typename T> T narrow(Accumulator<T> value);
template <> inline float narrow<float>(float value) { return value; }
template <> inline double narrow<double>(double value) { return value; }
template <> inline bf16 narrow<bf16>(float value) {
  uint32_t bits = __float_as_uint(value);
  if (value != value) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <> inline f16 narrow<f16>(float value) {
  uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (value != value) return {0x7fff};
  if (size >= 0x477ff000u) return {uint16_t(sign | 0x7c00)};  // 65520 and up round to infinity
  if (size < 0x38800000u)  // below 2^-14: the unit is 2^-24, which is the last bit of 0.5's binade
    return {uint16_t(sign | (__float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000u))};
  return {uint16_t(sign | (size - 0x38000000u + 0xfff + (size >> 13 & 1)) >> 13)};
}

}  // namespace fastsparse::cuda
