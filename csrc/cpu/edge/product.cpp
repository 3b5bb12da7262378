#include "cpu/edge/product.h"

#include <dlfcn.h>

#include <array>
#include <cmath>
#include <exception>
#include <vector>

#include "cpu/isa.h"

namespace fastsparse::edge {

namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

Tensor mm(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{from(a), from(torch::stable::transpose(b, 0, 1)), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

// A matrix whose rows don't overlap, as those of a view may.
Tensor apart(const Tensor& rows) {
  return rows.size(0) > 1 && rows.stride(0) < rows.size(1) ? torch::stable::contiguous(rows) : rows;
}

// oneDNN's fp32 linear. aten::mm goes to MKL, which on AMD processors with AVX-512 reaches half of oneDNN's rate (Zen 5; two
// thirds on Zen 4); on those with AVX2 alone it is MKL that is ahead, by a fifth (Zen 3). oneDNN's is called by the shim that PyTorch's own compiler uses, where a build has it: the dispatcher would lose the memory of the
// strings that this op takes (see fastsparse/_options.py).
using Linear = AOTITorchError (*)(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias,
                                  const char* after, const double** scalars, int64_t scalar_count,
                                  const char** algorithm, AtenTensorHandle* out);

Linear found_linear() {
  static const auto linear = reinterpret_cast<Linear>(dlsym(RTLD_DEFAULT, "aoti_torch_cpu__linear_pointwise"));
  return linear;
}

Tensor onednn_linear(const Tensor& a, const Tensor& b) {
  Tensor x = apart(a), weight = apart(b);
  AtenTensorHandle out = nullptr;
  const char* algorithm = "";
  TORCH_ERROR_CODE_CHECK(found_linear()(x.get(), weight.get(), nullptr, "none", nullptr, 0, &algorithm, &out));
  return Tensor(out);
}

}  // namespace

// Decided by the processor, and by what this build of PyTorch has, not by a stopwatch: the two libraries round differently,
// and a result must not depend on how busy the machine was.
bool prefers_onednn() {
  static const bool answer = [] {
    if (!cpu_features().amd || !cpu_features().avx512 || !found_linear()) return false;
    try {
      Tensor probe = allocate({16, 16}, ScalarType::Float);
      torch::stable::zero_(probe);
      onednn_linear(probe, probe);
      return true;
    } catch (const std::exception&) {
      return false;
    }
  }();
  return answer;
}

Tensor product(const Tensor& a, const Tensor& b, const Tensor& out) {
  constexpr int64_t tiny = int64_t{1} << 18;  // multiplications that take less time than finding oneDNN's kernel
  bool worthwhile = a.scalar_type() == ScalarType::Float && a.size(0) * a.size(1) * b.size(0) >= tiny;
  return worthwhile && prefers_onednn() ? onednn_linear(a, b) : mm(a, b, out);
}

bool in_full_precision(ScalarType type) {
  if (type != ScalarType::Float) return true;
  // No op says so: a product does, large enough to go where large ones go, of numbers that bf16 and TF32 would round.
  constexpr int64_t side = 64;
  constexpr float number = 1 + 0x1p-12f;
  Tensor out = allocate({side, side}, type);
  std::vector<float> same(side * side, number);
  Tensor ones = over(same.data(), side, side, side, type);
  Tensor sums = product(ones, ones, out);
  return std::fabs(*static_cast<const float*>(sums.const_data_ptr()) - side * number * number) < side * 0x1p-14f;
}

}  // namespace fastsparse::edge

extern "C" __attribute__((visibility("default"))) bool fastsparse_cpu_prefers_onednn() {
  return fastsparse::edge::prefers_onednn();
}
