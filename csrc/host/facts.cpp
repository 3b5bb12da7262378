#include "host/facts.h"

#include <string>

#include "cpu/isa.h"

#if defined(__clang__)
#define FASTSPARSE_COMPILER "clang " __clang_version__
#else
#define FASTSPARSE_COMPILER "gcc " __VERSION__
#endif
#if defined(__x86_64__)
#define FASTSPARSE_LEVELS R"("baseline", "avx2", "avx512")"
#else
#define FASTSPARSE_LEVELS R"("baseline")"
#endif
#if defined(__SANITIZE_ADDRESS__)
#define FASTSPARSE_SANITIZED "true"
#else
#define FASTSPARSE_SANITIZED "false"
#endif
#ifdef FASTSPARSE_CUDA
#define FASTSPARSE_CUDA_FACT "\"" FASTSPARSE_CUDA "\""
#else
#define FASTSPARSE_CUDA_FACT "null"
#endif

namespace fastsparse {

namespace {

const char* name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

const char* text(bool there) { return there ? "true" : "false"; }

}  // namespace

const char* build_facts() {
  return R"({"compiler": ")" FASTSPARSE_COMPILER R"(", "levels": [)" FASTSPARSE_LEVELS R"(], "sanitized": )"
      FASTSPARSE_SANITIZED R"(, "cuda": )" FASTSPARSE_CUDA_FACT "}";
}

const char* cpu_facts() {
  static const std::string facts = [] {
    const CpuFeatures& features = cpu_features();
    std::string said = "{\"avx2\": ";
    said.append(text(features.avx2)).append(", \"avx512\": ").append(text(features.avx512));
    said.append(", \"fast_bf16\": ").append(text(features.fast_bf16));
    said.append(", \"vnni\": ").append(text(features.vnni)).append(", \"avx_vnni\": ").append(text(features.avx_vnni));
    return said.append(", \"best_level\": \"").append(name(best_isa())).append("\"}");
  }();
  return facts.c_str();
}

}  // namespace fastsparse
