// Matrices as the sparse products' kernels take them.
#pragma once

#include "cuda/gather.cuh"
#include "tensors.h"

namespace fastsparse::cuda {

template <typename T> const T* data(const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); }
template <typename T> T* mutable_data(const Tensor& tensor) { return static_cast<T*>(tensor.mutable_data_ptr()); }

// Whether every row of a matrix of D columns with unit stride is whole packets on 16-byte boundaries.
template <typename T> bool takes_packets(const Tensor& rows, int64_t D) {
  constexpr int64_t size = Packet<T>::size;
  return D % size == 0 && (rows.size(0) <= 1 || rows.stride(0) % size == 0) &&
         reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0;
}

// Blocks of kGatherBlock threads.
inline unsigned gather_blocks(int64_t threads) { return unsigned((threads + kGatherBlock - 1) / kGatherBlock); }

}  // namespace fastsparse::cuda
