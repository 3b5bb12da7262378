// Tensors at PyTorch's stable ABI, on any device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "dtype.h"

namespace fastsparse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& tensor);
// The type that sums over a dtype are carried in, as PyTorch knows it.
ScalarType accumulator_of(ScalarType dtype);

// The tensor with unit stride along its rows, copied only where it hasn't.
Tensor with_unit_stride(const Tensor& tensor);
// The tensor contiguous and of a dtype, copied only where it isn't.
Tensor as_contiguous(const Tensor& tensor, ScalarType dtype);

// Rows [begin, begin + count) of a tensor that there is.
std::optional<Tensor> part_of(const std::optional<Tensor>& tensor, int64_t begin, int64_t count);

// Raises IndexError, naming the first offender, unless every index (N, k) or (E), contiguous in host memory, lies in [0, M).
void check_indices(const char* op, const Tensor& indices, int64_t M);

// Raises ValueError unless offsets (N + 1), contiguous in host memory, bound the rows of a code (E): from 0 on, never back,
// and to its end, or to where nothing but padding, of index 0, follows.
void check_offsets(const char* op, const Tensor& offsets, const Tensor& indices);

}  // namespace fastsparse
