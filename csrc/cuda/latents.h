// What belongs to each latent of a call, in device memory.
#pragma once

#include <optional>

#include "cuda/rows.h"
#include "cuda/stripes.h"
#include "cuda/topk_encode.cuh"

namespace fastsparse::cuda {

// Terms of M latents for tensors of type T, as the kernels of encoders take them. Keyed: keys differ from scores, or
// latents in eligibility.
template <typename T> class LatentMemory {
  using C = Accumulator<T>;

 public:
  LatentMemory(const Call& call, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& scale, const std::optional<Tensor>& mask, bool absolute)
      : keyed(absolute || scale || mask) {
    constexpr int64_t threads = 256;
    int64_t M = weight.size(0), padded = round_up(M, kGroup<C>);
    bias_ = allocate(weight, {padded}, accumulator_of(weight.scalar_type()));
    latents = {data<C>(*bias_), nullptr, nullptr, absolute};
    C* scale_out = nullptr;
    uint8_t* eligible_out = nullptr;
    if (keyed) {
      scale_ = allocate(weight, {padded}, accumulator_of(weight.scalar_type()));
      eligible_ = allocate(weight, {padded}, ScalarType::Byte);
      latents.scale = scale_out = mutable_data<C>(*scale_);
      latents.eligible = eligible_out = mutable_data<uint8_t>(*eligible_);
    }
    auto pointer = [](const std::optional<Tensor>& vector) { return vector ? vector->const_data_ptr() : nullptr; };
    auto stride = [](const std::optional<Tensor>& vector) { return vector ? vector->stride(0) : 0; };
    call.launch("topk_encode_prepare", topk_encode_prepare<T>, ceil_div(padded, threads), threads, 0,
                static_cast<const T*>(pointer(bias)), stride(bias), static_cast<const T*>(pointer(scale)),
                stride(scale), static_cast<const uint8_t*>(pointer(mask)), stride(mask), M, padded,
                mutable_data<C>(*bias_), scale_out, eligible_out);
  }

  bool keyed;
  Latents<C> latents{};

 private:
  std::optional<Tensor> bias_, scale_, eligible_;
};

}  // namespace fastsparse::cuda
