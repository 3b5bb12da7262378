#include "cpu/isa.h"

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace fastsparse {

namespace {

CpuFeatures detect() {
  CpuFeatures features;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // libgcc checks XGETBV too: a level counts only if the operating system saves its registers.
  features.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi2");
  features.amd = __builtin_cpu_is("amd");
  features.avx512 = features.avx2 && __builtin_cpu_supports("avx512f") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  unsigned a = 0, b = 0, c = 0, d = 0;
  bool more = __get_cpuid_count(7, 1, &a, &b, &c, &d);
  bool avx512_bf16 = more && (a >> 5 & 1);
  features.avx_vnni = features.avx2 && more && (a >> 4 & 1);
  bool amx_bf16 = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
  features.zen5 = features.amd && features.avx_vnni;  // which no earlier one has
  features.vnni = features.avx512 && (c >> 11 & 1);
  features.fast_bf16 = features.avx512 && (avx512_bf16 || amx_bf16);
  features.bf16_dots = features.avx512 && avx512_bf16;
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long bf16 = 1ul << 14;  // HWCAP2_BF16, which older headers lack
  features.fast_bf16 = getauxval(AT_HWCAP2) & bf16;
#endif
  return features;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

Isa best_isa() {
  const CpuFeatures& features = cpu_features();
  return features.avx512 ? Isa::avx512 : features.avx2 ? Isa::avx2 : Isa::baseline;
}

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }
void set_isa(Isa isa) { chosen().store(isa, std::memory_order_relaxed); }

}  // namespace fastsparse
