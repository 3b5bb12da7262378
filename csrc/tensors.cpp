#include "tensors.h"

#include <stdexcept>

namespace fastsparse {

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Double: return DType::f64;
    default: throw std::invalid_argument("fastsparse: tensors must be float32, bfloat16, float16 or float64");
  }
}

ScalarType accumulator_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor with_unit_stride(const Tensor& tensor) {
  return tensor.stride(1) == 1 || tensor.size(1) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

Tensor as_contiguous(const Tensor& tensor, ScalarType dtype) {
  return torch::stable::contiguous(tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}

}  // namespace fastsparse
