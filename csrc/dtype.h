// Storage types of tensors, the type that sums over them are carried in, and ranges.
#pragma once

#include <cstdint>

namespace fastsparse {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

struct Range { int64_t begin, end; };

enum class DType : int { f32, bf16, f16, f64 };

template <typename T> struct AccumulatorOf { using type = float; };
template <> struct AccumulatorOf<double> { using type = double; };
template <typename T> using Accumulator = typename AccumulatorOf<T>::type;

template <typename T> struct TypeTag { using type = T; };

// Calls f(TypeTag<T>{}) with the C++ type of a dtype.
template <typename F> auto with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16: return f(TypeTag<bf16>{});
    case DType::f16: return f(TypeTag<f16>{});
    case DType::f64: return f(TypeTag<double>{});
    default: return f(TypeTag<float>{});
  }
}

}  // namespace fastsparse
