// What Python can ask of the build and of this machine where PyTorch is not loaded.
#include <pybind11/pybind11.h>

#include "host/facts.h"

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.doc() = "What was built, and what this CPU can run.";
  static auto read = [](const char* facts) { return py::dict(py::module_::import("json").attr("loads")(facts)); };
  m.def("build_info", [] { return read(fastsparse::build_facts()); },
        "Compiler, instruction-set levels and sanitizers; of CUDA the toolkit's version and the code compiled, or None.");
  m.def("cpu_features", [] { return read(fastsparse::cpu_facts()); },
        "The CPU's features that kernels choose by, and the best level it can run.");
}
