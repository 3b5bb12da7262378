#include "cpu/edge/screening.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <limits>

namespace fastsparse::edge {

namespace {
std::atomic<int> choice{-1};  // by what pays (-1), or for tests never (0) or wherever it is possible (1)
}

bool screens(DType dtype, int64_t N, int64_t D, int64_t latents, int64_t k) {
  bool possible = dtype != DType::f64 && D > 0 && N > 0;
  int forced = choice.load(std::memory_order_relaxed);
  if (forced >= 0 || !possible) return possible && forced == 1;
  // The bf16 product must be the faster one, and enough tokens must share the rounding of the weight; a large k leaves
  // little to drop.
  return cpu_features().fast_bf16 && current_isa() == Isa::avx512 && N >= 16 && D >= 64 && latents >= 1024 &&
         k <= latents / 16;
}

Stripe bracketed(Stripe stripe, float* norm, float* residual, float* rest, int64_t D) {
  auto* bias = static_cast<const float*>(stripe.bias);
  auto* scale = static_cast<const float*>(stripe.scale);
  float flushed = float(std::sqrt(double(D)) * 0x1p-125);
  for (int64_t m = 0; m < stripe.count; ++m) {
    float factor = scale ? std::fabs(scale[m]) : 1.0f;
    rest[m] = (0x1p-20f * std::fabs(bias[m]) + flushed * norm[m] + float(D) * 0x1p-125f) * factor;
    residual[m] = (residual[m] + flushed) * factor;
    norm[m] *= factor;
    auto raise = [](float& most, float value) {
      most = value <= FLT_MAX ? std::max(most, value) : std::numeric_limits<float>::infinity();
    };
    raise(stripe.most_norm, norm[m]);
    raise(stripe.most_residual, residual[m]);
    raise(stripe.most_rest, rest[m]);
  }
  stripe.norm = norm;
  stripe.residual = residual;
  stripe.rest = rest;
  return stripe;
}

}  // namespace fastsparse::edge

// For tests, of every op that screens.
extern "C" __attribute__((visibility("default"))) void fastsparse_cpu_set_screening(int choice) {
  fastsparse::edge::choice.store(choice);
}
