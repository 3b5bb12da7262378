#include "cuda/sort.h"

#ifdef FASTSPARSE_EMULATED
#include <algorithm>
#include <numeric>
#include <vector>
#else
#include <cub/device/device_radix_sort.cuh>
#endif

namespace fastsparse::cuda {

namespace {

// Sorts with the help of `other`; returns whether the result ended there.
template <typename T>
bool sort_into(const Call& call, const Pairs& pairs, const Pairs& other, int bits) {
  int64_t count = pairs.keys.numel();
  T *keys = static_cast<T*>(pairs.keys.mutable_data_ptr()), *values = static_cast<T*>(pairs.values.mutable_data_ptr());
  T *other_keys = static_cast<T*>(other.keys.mutable_data_ptr()),
    *other_values = static_cast<T*>(other.values.mutable_data_ptr());
#ifdef FASTSPARSE_EMULATED
  T mask = bits < int(8 * sizeof(T)) ? (T{1} << bits) - 1 : ~T{0};
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return (keys[a] & mask) < (keys[b] & mask); });
  for (int64_t i = 0; i < count; ++i) other_keys[i] = keys[order[i]], other_values[i] = values[order[i]];
  return true;
#else
  cub::DoubleBuffer<T> key_buffers(keys, other_keys), value_buffers(values, other_values);
  auto run = [&](void* memory, size_t& bytes) {
    check(cub::DeviceRadixSort::SortPairs(memory, bytes, key_buffers, value_buffers, count, 0, bits, call.stream()),
          "sorting");
  };
  size_t bytes = 0;
  run(nullptr, bytes);
  Tensor scratch = allocate(pairs.keys, {int64_t(bytes)}, ScalarType::Byte);
  run(scratch.mutable_data_ptr(), bytes);
  return key_buffers.selector == 1;
#endif
}

}  // namespace

Pairs sort_pairs(const Call& call, const Pairs& pairs, int bits) {
  int64_t count = pairs.keys.numel();
  if (count <= 1 || bits <= 0) return pairs;
  ScalarType dtype = pairs.keys.scalar_type();
  Pairs other{allocate(pairs.keys, {count}, dtype), allocate(pairs.keys, {count}, dtype)};
  bool elsewhere = dtype == ScalarType::Long ? sort_into<uint64_t>(call, pairs, other, bits)
                                             : sort_into<uint32_t>(call, pairs, other, bits);
  return elsewhere ? other : pairs;
}

}  // namespace fastsparse::cuda
