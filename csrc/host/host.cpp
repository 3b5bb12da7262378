// What Python can ask of the build and of this machine, without PyTorch.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

const char* name(fastsparse::Isa isa) {
  switch (isa) {
    case fastsparse::Isa::avx512: return "avx512";
    case fastsparse::Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

py::dict build_info() {
#if defined(__clang__)
  const char* compiler = "clang " __clang_version__;
#else
  const char* compiler = "gcc " __VERSION__;
#endif
#if defined(__x86_64__)
  py::tuple levels = py::make_tuple("baseline", "avx2", "avx512");
#else
  py::tuple levels = py::make_tuple("baseline");
#endif
#if defined(__SANITIZE_ADDRESS__)
  bool sanitized = true;
#else
  bool sanitized = false;
#endif
#ifdef FASTSPARSE_CUDA
  py::object cuda = py::str(FASTSPARSE_CUDA);
#else
  py::object cuda = py::none();
#endif
  return py::dict("compiler"_a = compiler, "levels"_a = levels, "sanitized"_a = sanitized, "cuda"_a = cuda);
}

py::dict cpu_features() {
  const fastsparse::CpuFeatures& features = fastsparse::cpu_features();
  return py::dict("avx2"_a = features.avx2, "avx512"_a = features.avx512, "fast_bf16"_a = features.fast_bf16,
                  "best_level"_a = name(fastsparse::best_isa()));
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "What was built, and what this CPU can run.";
  m.def("build_info", &build_info, "Compiler, instruction-set levels and sanitizers; of CUDA the toolkit's version and the code compiled, or None.");
  m.def("cpu_features", &cpu_features, "The CPU's features that kernels choose by, and the best level it can run.");
}
