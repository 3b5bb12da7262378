// What every CUDA op needs where PyTorch's stable ABI ends and raw pointers begin.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "cuda/device.cuh"
#include "registration.h"

// The dispatch key that the kernels serve: CPU under the test-only emulator.
#ifdef FASTSPARSE_EMULATED
#define FASTSPARSE_DEVICE_KEY CPU
#else
#define FASTSPARSE_DEVICE_KEY CUDA
#endif

namespace fastsparse::cuda {

// A new, uninitialised, contiguous tensor on the device of another.
Tensor allocate(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype);

// One op's call: makes the tensor's device the current one while it lives, and knows the stream to work on.
class Call {
 public:
  explicit Call(const Tensor& tensor);
  cudaStream_t stream() const { return stream_; }
  int multiprocessors() const { return multiprocessors_; }
  // Dynamic shared memory that a block may have beside a few kB of static one.
  int64_t most_shared_bytes() const;
  // Whether the stream's work goes into a CUDA graph, to run later.
  bool capturing() const;

  // Runs a kernel on the stream; raises, naming it, where the launch fails. A grid or block of no threads is no launch.
  template <typename... Parameters, typename... Arguments>
  void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
              Arguments... arguments) const {
    static_assert(sizeof...(Parameters) == sizeof...(Arguments), "a kernel is launched with all its arguments");
    if (!grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z) return;
    allow(name, reinterpret_cast<const void*>(kernel), shared_bytes);
#ifdef FASTSPARSE_EMULATED
    emulator::launch(name, kernel, grid, block, shared_bytes, arguments...);
#else
    std::apply(
        [&](auto... parameters) {
          void* pointers[] = {&parameters..., nullptr};  // never of size 0
          launch(name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, pointers);
        },
        std::tuple<Parameters...>(Parameters(arguments)...));
#endif
  }

 private:
  // Lets launches of a kernel have so much shared memory, without which 48 kB are the most, static memory included. That
  // is one number a device, for all threads, one of which may be about to launch with more: so it only ever rises.
  void allow(const char* name, const void* kernel, size_t shared_bytes) const;
  void launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void** parameters) const;

#ifndef FASTSPARSE_EMULATED
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_ = nullptr;
  int device_ = 0, multiprocessors_ = 0;
};

// a @ b.T of (N, D) and (M, D), of any strides, by the vendor's library, on the current device and stream, into out
// (N, M) of the accumulation type, whose rows may be further apart than they are long. Sums are carried in fp32 for fp32
// (never TF32), bf16 and fp16, in fp64 for fp64.
void product(const Tensor& a, const Tensor& b, const Tensor& out);

// Under FASTSPARSE_DEBUG=1 raises IndexError, naming the first offender, unless every index (N, k) lies in [0, M), and
// ValueError unless offsets (N + 1) bound the rows of a ragged code (E): it waits for the device. Otherwise, and while a
// CUDA graph is being captured, does nothing.
void check_indices(const Call& call, const char* op, const Tensor& indices, int64_t M,
                   const std::optional<Tensor>& offsets = std::nullopt);

// Raises where CUDA reports an error, saying what failed.
void check(cudaError_t error, const char* what);

}  // namespace fastsparse::cuda
