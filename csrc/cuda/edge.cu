#include "cuda/edge.h"

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/knobs.h"

#ifndef FASTSPARSE_EMULATED
#include <dlfcn.h>
#endif

namespace fastsparse::cuda {

Tensor allocate(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty({sizes.begin(), sizes.size()}, dtype, std::nullopt, like.device());
}

void check_indices(const Call& call, const char* op, const Tensor& indices, int64_t M,
                   const std::optional<Tensor>& offsets) {
  const char* debug = std::getenv("FASTSPARSE_DEBUG");
  if (!debug || std::strcmp(debug, "1") != 0) return;
#ifndef FASTSPARSE_EMULATED
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(call.stream(), &status), "asking whether a graph is being captured");
  if (status != cudaStreamCaptureStatusNone) return;
#endif
  auto read = [](const Tensor& tensor) {
    torch::stable::Device host(torch::headeronly::DeviceType::CPU);
    return torch::stable::contiguous(torch::stable::to(tensor, host));
  };
  Tensor code = read(indices);
  fastsparse::check_indices(op, code, M);
  if (offsets) check_offsets(op, read(*offsets), code);
}

void Call::allow(const char* name, const void* kernel, size_t shared_bytes) const {
  if (!shared_bytes) return;
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, size_t> allowed;
  std::lock_guard lock(mutex);
  size_t& now = allowed[{device_, kernel}];
  if (shared_bytes <= now) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
        ("asking for " + std::to_string(shared_bytes) + " bytes of shared memory for " + name).c_str());
  now = shared_bytes;
}

Knobs knobs;
extern "C" __attribute__((visibility("default"))) Knobs* fastsparse_cuda_knobs() { return &knobs; }

#ifdef FASTSPARSE_EMULATED

void check(cudaError_t, const char*) {}  // nothing that is emulated reports one
Call::Call(const Tensor&) : multiprocessors_(4) {}
int64_t Call::most_shared_bytes() const { return int64_t{64} << 10; }
bool Call::capturing() const { return knobs.capturing != 0; }

void product(const Tensor& a, const Tensor& b, const Tensor& out) {
  ScalarType dtype = accumulator_of(a.scalar_type());
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(as_contiguous(a, dtype)),
      torch::stable::detail::from(torch::stable::transpose(as_contiguous(b, dtype), 0, 1)),
      torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

#else

namespace {

// cuBLAS as PyTorch has loaded it, and PyTorch's own CUDA part, are found while running: linking to either would tie the
// binary to one build of PyTorch. Types and constants are those of cublas_api.h, which are part of cuBLAS's stable ABI.
using BlasHandle = void*;
enum Transpose : int { kPlain = 0, kTransposed = 1 };                    // cublasOperation_t
enum DataType : int { kF32 = 0, kF64 = 1, kF16 = 2, kBF16 = 14 };         // cudaDataType
enum ComputeType : int { k32 = 68, k32Pedantic = 69, k64Pedantic = 71 };  // cublasComputeType_t
constexpr int kDefaultAlgorithm = -1;                                     // cublasGemmAlgo_t

struct Found {
  AOTITorchError (*current_stream)(int32_t device, void** stream) = nullptr;
  AOTITorchError (*current_blas)(BlasHandle* handle) = nullptr;
  int (*gemm)(BlasHandle, int, int, int64_t, int64_t, int64_t, const void*, const void*, int, int64_t, const void*, int,
              int64_t, const void*, void*, int, int64_t, int, int) = nullptr;
  const char* (*blas_message)(int status) = nullptr;
  const char* missing = nullptr;

  Found() {
    // A search in a loaded library goes on in those that it depends on, cuBLAS among them.
    library_ = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (!library_) {
      missing = "libtorch_cuda.so is not loaded: this PyTorch is built without CUDA";
      return;
    }
    find(current_stream, "aoti_torch_get_current_cuda_stream");
    find(current_blas, "torch_get_current_cuda_blas_handle");
    find(gemm, "cublasGemmEx_64");
    find(blas_message, "cublasGetStatusString");
  }

 private:
  template <typename Function> void find(Function& function, const char* name) {
    function = reinterpret_cast<Function>(dlsym(library_, name));
    if (!function) missing = name;
  }
  void* library_ = nullptr;
};

const Found& found() {
  static const Found result;
  if (result.missing)
    throw std::runtime_error(std::string("fastsparse: not found in this build of PyTorch: ") + result.missing);
  return result;
}

// What a device is asked for once.
using Known = std::array<std::atomic<int>, 64>;
int attribute(Known& known, cudaDeviceAttr which, int device, const char* asking) {
  int value = device < int(known.size()) ? known[device].load(std::memory_order_relaxed) : 0;
  if (value) return value;
  check(cudaDeviceGetAttribute(&value, which, device), asking);
  if (device < int(known.size())) known[device].store(value, std::memory_order_relaxed);
  return value;
}

int multiprocessors_of(int device) {
  static Known known{};
  return attribute(known, cudaDevAttrMultiProcessorCount, device, "counting multiprocessors");
}

DataType blas_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return kF32;
    case ScalarType::Double: return kF64;
    case ScalarType::Half: return kF16;
    default: return kBF16;
  }
}

// A matrix as cuBLAS, which thinks in columns, can read it: copied where neither its rows nor its columns are dense.
struct Operand {
  Tensor held;
  bool row_major;
  int64_t leading;

  explicit Operand(const Tensor& matrix) : held(matrix), row_major(true) {
    if (dense(matrix, 1)) {
      leading = distance(matrix, 1);
    } else if (dense(matrix, 0)) {
      row_major = false;
      leading = distance(matrix, 0);
    } else {
      held = torch::stable::contiguous(matrix);
      leading = distance(held, 1);
    }
  }

  static bool dense(const Tensor& matrix, int along) {
    int64_t size = matrix.size(along);
    return (size <= 1 || matrix.stride(along) == 1) && (matrix.size(1 - along) <= 1 || matrix.stride(1 - along) >= size);
  }
  static int64_t distance(const Tensor& matrix, int along) {
    int64_t size = matrix.size(along) < 1 ? 1 : matrix.size(along);
    return matrix.size(1 - along) <= 1 ? size : matrix.stride(1 - along);
  }
};

}  // namespace

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next call doesn't find it again
  throw std::runtime_error(std::string("fastsparse: ") + what + ": " + cudaGetErrorString(error));
}

Call::Call(const Tensor& tensor)
    : guard_(tensor.get_device_index()), device_(tensor.get_device_index()),
      multiprocessors_(multiprocessors_of(device_)) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(found().current_stream(tensor.get_device_index(), &stream));
  stream_ = static_cast<cudaStream_t>(stream);
}

int64_t Call::most_shared_bytes() const {
  constexpr int64_t of_its_own = 8 << 10;  // what kernels declare, and CUDA's
  static Known known{};
  return attribute(known, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_, "asking for shared memory") - of_its_own;
}

bool Call::capturing() const {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream_, &status), "asking whether a graph is being captured");
  return status != cudaStreamCaptureStatusNone;
}

void Call::launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                  void** parameters) const {
  cudaError_t error = cudaLaunchKernel(kernel, grid, block, parameters, shared_bytes, stream_);
  if (error == cudaSuccess) return;
  char what[256];
  std::snprintf(what, sizeof what, "launching %s with grid (%u, %u, %u), block (%u, %u, %u), %zu bytes of shared memory",
                name, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared_bytes);
  check(error, what);
}

// cuBLAS itself, not aten::mm: that one takes fp32 through TF32 wherever a program allows it for its own products, and
// bf16's split sums through bf16; a handle's settings are global or the calling thread's, a compute type is this call's.
// A pedantic one is what no setting changes: others may be emulated, fp32 by bf16 and fp64 by integers.
void product(const Tensor& a, const Tensor& b, const Tensor& out) {
  int64_t N = a.size(0), D = a.size(1), M = b.size(0);
  if (N == 0 || M == 0) return;
  if (D == 0) {
    Tensor zeroed = out;
    torch::stable::zero_(zeroed);
    return;
  }
  Operand left(a), right(b);
  bool wide = a.scalar_type() == ScalarType::Double;
  ComputeType compute = wide ? k64Pedantic : a.scalar_type() == ScalarType::Float ? k32Pedantic : k32;
  float one = 1, zero = 0;
  double wide_one = 1, wide_zero = 0;
  const void *alpha = &one, *beta = &zero;
  if (wide) alpha = &wide_one, beta = &wide_zero;
  DataType type = blas_type(a.scalar_type());
  BlasHandle handle = nullptr;  // on the current device and stream, with a workspace that graphs may keep
  TORCH_ERROR_CODE_CHECK(found().current_blas(&handle));
  // Row by row, out is out.T column by column: out.T = b @ a.T.
  int status = found().gemm(handle, right.row_major ? kTransposed : kPlain, left.row_major ? kPlain : kTransposed, M, N,
                            D, alpha, right.held.const_data_ptr(), type, right.leading, left.held.const_data_ptr(), type,
                            left.leading, beta, out.mutable_data_ptr(), wide ? kF64 : kF32,
                            N > 1 ? out.stride(0) : M, compute, kDefaultAlgorithm);
  if (status != 0)
    throw std::runtime_error(std::string("fastsparse: cuBLAS's product failed: ") + found().blas_message(status));
}

// What fastsparse/backend.py asks of the library before it uses it. Null, or why it can't run here.
extern "C" __attribute__((visibility("default"))) const char* fastsparse_cuda_failure() {
  static const Found probe;
  if (probe.missing) return probe.missing;
  int devices = 0;
  cudaError_t error = cudaGetDeviceCount(&devices);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// What there is machine code for (sm_) and, portable, PTX (compute_): setup.py says.
extern "C" __attribute__((visibility("default"))) const char* fastsparse_cuda_contents() {
  return FASTSPARSE_CUDA_CONTENTS;
}

#endif

}  // namespace fastsparse::cuda
