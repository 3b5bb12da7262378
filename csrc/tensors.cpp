#include "tensors.h"

#include <stdexcept>
#include <string>

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
  // Even a contiguous() that has nothing to do goes through the dispatcher: a tenth of a tiny call.
  if (tensor.scalar_type() == dtype && tensor.is_contiguous()) return tensor;
  return torch::stable::contiguous(tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}

void check_indices(const char* op, const Tensor& indices, int64_t M) {
  const int64_t* index = indices.const_data_ptr<int64_t>();
  int64_t count = indices.numel();
  uint64_t outside = 0;
  for (int64_t i = 0; i < count; ++i) outside |= uint64_t(uint64_t(index[i]) >= uint64_t(M));
  if (!outside) return;
  int64_t i = 0, k = indices.size(1);
  while (uint64_t(index[i]) < uint64_t(M)) ++i;
  throw std::out_of_range(std::string(op) + ": indices[" + std::to_string(i / k) + ", " + std::to_string(i % k) +
                          "] must be in [0, " + std::to_string(M) + "), got " + std::to_string(index[i]));
}

}  // namespace fastsparse
