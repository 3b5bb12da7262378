#include "cpu/edge/edge.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <new>
#include <stdexcept>
#include <string>

namespace fastsparse::edge {

namespace {
constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
}

Tensor allocate(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty({sizes.begin(), sizes.size()}, dtype);
}

void prefer_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__)
  auto begin = reinterpret_cast<uintptr_t>(memory);
  uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

void Scratch::grow(size_t bytes) {
  memory_.reset();  // before the larger one is there
  bytes_ = 0;
  size_t alignment = bytes >= kHugePage ? kHugePage : 64;
  size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  memory_.reset(std::aligned_alloc(alignment, rounded));
  if (!memory_) throw std::bad_alloc();
  bytes_ = rounded;
  prefer_huge_pages(memory_.get(), rounded);
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
