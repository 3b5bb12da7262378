#include "cpu/edge/edge.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdio>
#include <new>
#include <stdexcept>

namespace fastsparse::edge {

namespace {

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

struct NoRoom : std::bad_alloc {
  explicit NoRoom(double bytes) { std::snprintf(text, sizeof text, "out of memory: no room for %.3g GiB", bytes / 0x1p30); }
  const char* what() const noexcept override { return text; }
  char text[64];
};

}  // namespace

Tensor allocate(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  try {
    // torch::stable::empty would look the op up by its name and pack its arguments, which takes longer than allocating.
    constexpr size_t most = 8;
    int64_t strides[most], stride = 1;
    for (size_t dim = sizes.size(); dim-- > 0; stride *= std::max<int64_t>(sizes.begin()[dim], 1)) strides[dim] = stride;
    AtenTensorHandle tensor = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        int64_t(sizes.size()), sizes.begin(), strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
        aoti_torch_device_type_cpu(), 0, &tensor));
    return Tensor(tensor);
  } catch (const std::runtime_error&) {
    double bytes = dtype == ScalarType::Double || dtype == ScalarType::Long ? 8 : dtype == ScalarType::Float ? 4 : 2;
    for (int64_t size : sizes) bytes *= double(size);
    throw NoRoom(bytes);
  }
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

}  // namespace fastsparse::edge
