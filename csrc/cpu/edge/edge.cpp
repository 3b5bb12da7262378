#include "cpu/edge/edge.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <stdexcept>
#include <string>

namespace fastsparse::edge {

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

Tensor allocate(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty({sizes.begin(), sizes.size()}, dtype);
}

Tensor allocate_large(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  Tensor tensor = allocate(sizes, dtype);
#if defined(__linux__)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  auto begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  uintptr_t end = begin + uintptr_t(tensor.numel()) * tensor.element_size();
  uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: may fail
#endif
  return tensor;
}

Tensor over(const void* memory, int64_t rows, int64_t columns, int64_t row_stride, ScalarType dtype) {
  return torch::stable::from_blob(const_cast<void*>(memory), {rows, columns}, {row_stride, 1},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
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

}  // namespace fastsparse::edge
