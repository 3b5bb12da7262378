// What every CUDA op needs where PyTorch's stable ABI ends and raw pointers begin.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <initializer_list>

#include "cuda/device.cuh"
#include "tensors.h"

// The dispatch key that the kernels serve: CPU under the test-only emulator.
#ifdef FASTSPARSE_EMULATED
#define FASTSPARSE_DEVICE_KEY CPU
#else
#define FASTSPARSE_DEVICE_KEY CUDA
#endif

namespace fastsparse::cuda {

// A new, uninitialised, contiguous tensor on the device of another.
Tensor allocate(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype);

// a @ b.T of (N, D) and (M, D) by the vendor's library, into out (N, M) of the accumulation type: sums are carried in
// fp32 for fp32 (never TF32), bf16 and fp16, in fp64 for fp64. out may be a view with a row stride.
void product(const Tensor& a, const Tensor& b, const Tensor& out);

// One op's call: makes the tensor's device the current one while it lives, and knows the stream to work on.
class Call {
 public:
  explicit Call(const Tensor& tensor);
  cudaStream_t stream() const { return stream_; }
  int multiprocessors() const { return multiprocessors_; }

  // Runs a kernel on the stream; raises, naming it, where the launch fails. A grid or block of no threads is no launch.
  template <typename... Parameters, typename... Arguments>
  void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
              Arguments... arguments) const;

 private:
  torch::stable::accelerator::DeviceGuard guard_;  // no-op under the emulator
  cudaStream_t stream_ = nullptr;
  int multiprocessors_ = 0;
};

// Under FASTSPARSE_DEBUG=1 raises IndexError, naming the first offender, unless every index (N, k) lies in [0, M): it
// waits for the device. Otherwise does nothing.
void check_indices(const Call& call, const char* op, const Tensor& indices, int64_t M);

}  // namespace fastsparse::cuda
