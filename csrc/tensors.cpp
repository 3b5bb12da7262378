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

std::optional<Tensor> part_of(const std::optional<Tensor>& tensor, int64_t begin, int64_t count) {
  if (!tensor || count == tensor->size(0)) return tensor;
  Tensor whole = *tensor;
  return torch::stable::narrow(whole, 0, begin, count);
}

void check_indices(const char* op, const Tensor& indices, int64_t M) {
  const int64_t* index = indices.const_data_ptr<int64_t>();
  int64_t count = indices.numel();
  uint64_t signs = 0;  // of an index, or of what is left of M: sums and their bits, which every vector unit has
  for (int64_t i = 0; i < count; ++i) signs |= uint64_t(index[i]) | (uint64_t(M - 1) - uint64_t(index[i]));
  if (!(signs >> 63)) return;
  int64_t i = 0;
  while (uint64_t(index[i]) < uint64_t(M)) ++i;
  std::string place = std::to_string(i);
  if (indices.dim() == 2) place = std::to_string(i / indices.size(1)) + ", " + std::to_string(i % indices.size(1));
  throw std::out_of_range(std::string(op) + ": indices[" + place + "] must be in [0, " + std::to_string(M) + "), got " +
                          std::to_string(index[i]));
}

void check_offsets(const char* op, const Tensor& offsets, const Tensor& indices) {
  const int64_t *bound = offsets.const_data_ptr<int64_t>(), *index = indices.const_data_ptr<int64_t>();
  int64_t N = offsets.numel() - 1, entries = indices.numel();
  auto refuse = [&](const std::string& must) { throw std::invalid_argument(std::string(op) + ": offsets must " + must); };
  if (bound[0] != 0) refuse("begin at 0, got " + std::to_string(bound[0]));
  for (int64_t n = 0; n < N; ++n)
    if (bound[n + 1] < bound[n])
      refuse("not decrease, got " + std::to_string(bound[n + 1]) + " after " + std::to_string(bound[n]) + " at " +
             std::to_string(n + 1));
  bool ends = bound[N] <= entries;
  for (int64_t i = bound[N]; ends && i < entries; ++i) ends = index[i] == 0;
  if (!ends)
    refuse("end at the number of entries (" + std::to_string(entries) + "), got " + std::to_string(bound[N]) +
           "; what lies behind is padding only where its indices are 0");
}

}  // namespace fastsparse
