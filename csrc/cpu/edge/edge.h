// What every CPU op needs where PyTorch's stable ABI ends and raw pointers begin.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "registration.h"
#include "cpu/edge/float_mode.h"

namespace fastsparse::edge {

// Of the last level of the cache, what a call may count on.
inline constexpr int64_t kCache = int64_t{16} << 20;

// A new, uninitialised, contiguous tensor on the CPU.
Tensor allocate(std::initializer_list<int64_t> sizes, ScalarType dtype);

// Asks for huge pages under memory that is about to be written for the first time, where it is large enough: a fault
// for each 4 kB page takes several times as long as writing it. Only a request: the system may decline.
void prefer_huge_pages(void* memory, size_t bytes);

// Uninitialised memory that is kept from use to use and grows when it must. (A tensor costs a trip through the
// dispatcher, which is most of the time of a tiny call.)
class Scratch {
 public:
  template <typename T> T* get(int64_t count) {
    if (size_t bytes = size_t(count) * sizeof(T); bytes > bytes_) grow(bytes);
    return static_cast<T*>(memory_.get());
  }
  const void* data() const { return memory_.get(); }
  size_t bytes() const { return bytes_; }

 private:
  void grow(size_t bytes);
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t bytes_ = 0;
};
// A tensor over memory that outlives it.
Tensor over(const void* memory, int64_t rows, int64_t columns, int64_t row_stride, ScalarType dtype);

// How many rows make a task worth handing to a thread, when each reads so many bytes.
inline int64_t rows_a_task(int64_t bytes) {
  int64_t rows = (int64_t{192} << 10) / (bytes + 1);
  return rows < 1 ? 1 : rows > 64 ? 64 : rows;
}

// How many entries of a ragged code do, when each reads so many bytes beside its number and its index. More than of rows,
// since a task cuts what it begins and ends in.
inline int64_t entries_a_task(int64_t bytes) { return std::max<int64_t>(1, (int64_t{512} << 10) / (bytes + 12)); }

// Calls task(arguments..., begin, end), such as FASTSPARSE_KERNEL(spmm), over [0, count) in pieces of `grain`, handed out
// as threads become free: rows and latents differ in work, and so do cores. A task must not depend on which pieces it
// gets. All threads compute in the caller's mode.
template <typename Task, typename... Arguments>
void parallel(int64_t count, int64_t grain, const Task& task, const Arguments&... arguments) {
  if (count <= grain) {
    if (count > 0) task(arguments..., int64_t{0}, count);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&, mode = float_mode()](int64_t, int64_t) {
    InFloatMode here(mode);
    for (int64_t begin; (begin = next.fetch_add(grain, std::memory_order_relaxed)) < count;)
      task(arguments..., begin, begin + grain < count ? begin + grain : count);
  });
}

}  // namespace fastsparse::edge
