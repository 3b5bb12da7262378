#include "cpu/edge/sequences.h"

#include <stdexcept>
#include <string>

namespace fastsparse::edge {

Sequences sequences_of(const char* op, const std::optional<Tensor>& cu_seqlens, int64_t B, int64_t T, Tensor& keep) {
  if (!cu_seqlens) return {nullptr, B, T};
  keep = as_contiguous(*cu_seqlens, ScalarType::Long);
  const int64_t* bounds = keep.const_data_ptr<int64_t>();
  int64_t count = keep.numel() - 1;
  bool rising = count >= 0 && B == 1 && bounds[0] == 0 && bounds[count] == T;
  for (int64_t s = 0; s < count; ++s) rising &= bounds[s] <= bounds[s + 1];
  if (!rising)
    throw std::invalid_argument(std::string(op) + ": cu_seqlens must go from 0 to T = " + std::to_string(T) +
                                " and not decrease, for B = 1");
  return {bounds, count, T};
}

Tensor with_unit_channels(const Tensor& tensor) {
  int64_t last = tensor.dim() - 1;
  if (tensor.stride(last) == 1 || tensor.size(last) <= 1) return tensor;
  Tensor once = tensor;
  for (int64_t dim = 0; dim < last; ++dim)
    if (once.stride(dim) == 0 && once.size(dim) > 1) once = torch::stable::narrow(once, dim, 0, 1);
  return torch::stable::contiguous(once);
}

namespace {
int64_t stride_of(const Tensor& tensor, int64_t dim) {
  return dim + 1 < tensor.dim() && tensor.size(dim) > 1 ? tensor.stride(dim) : 0;
}
}  // namespace

Series series_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), stride_of(tensor, 0), stride_of(tensor, 1), stride_of(tensor, 2),
          stride_of(tensor, 3)};
}

Series states_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), stride_of(tensor, 0), 0, stride_of(tensor, 1), 0};
}

int64_t channels_a_task(int64_t sequences, int64_t H, Shares shares) {
  int64_t width = shares.channels, wanted = shares.tasks * int64_t(torch::stable::get_num_threads());
  while (width > 16 && sequences * ((H + width - 1) / width) < wanted) width /= 2;
  return width;
}

}  // namespace fastsparse::edge
