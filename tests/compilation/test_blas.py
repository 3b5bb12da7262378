"""What the CUDA library asks cuBLAS for, told by one that keeps the question: no GPU is needed for that."""

import os
import shutil
import subprocess
import sys

import pytest

from compilation.headers import setup

# Under the name of PyTorch's own CUDA part, with all that csrc/cuda/edge.cu looks for in it.
ASKED = """
#include <cstdint>
extern "C" {
int asked = 0;
int aoti_torch_get_current_cuda_stream(int32_t, void** stream) { *stream = nullptr; return 0; }
int torch_get_current_cuda_blas_handle(void** handle) { *handle = nullptr; return 0; }
int cublasGemmEx_64(void*, int, int, int64_t, int64_t, int64_t, const void*, const void*, int, int64_t,
                    const void*, int, int64_t, const void*, void*, int, int64_t, int compute, int) {
  asked = compute;
  return 0;
}
const char* cublasGetStatusString(int) { return ""; }
}
"""

ASKS = """
#include "cuda/edge.h"
extern "C" __attribute__((visibility("default"))) void ask(double* memory, int type) {
  using namespace torch;
  auto one = stable::from_blob(memory, {2, 2}, {2, 1}, stable::Device(headeronly::DeviceType::CPU),
                               static_cast<headeronly::ScalarType>(type));
  fastsparse::cuda::product(one, one, one);
}
"""

# ScalarTypes are float16, float32, float64, bfloat16.
PRINT = """
import ctypes, sys, torch
cublas = ctypes.CDLL(sys.argv[1])
library, memory = ctypes.CDLL(sys.argv[2]), (ctypes.c_double * 4)()
for dtype in (5, 6, 7, 15):
    library.ask(memory, dtype)
    print(ctypes.c_int.in_dll(cublas, "asked").value)
"""


def test_compute_types_that_no_setting_changes(monkeypatch, tmp_path):
    """Of halves CUBLAS_COMPUTE_32F (68), which holds their products; of others _PEDANTIC (69, 71 in fp64)."""
    if shutil.which("nvcc") is None:
        assert os.environ.get("FASTSPARSE_CUDA") != "1", "CUDA is insisted on, and nvcc is missing"
        pytest.skip("nvcc is missing")
    monkeypatch.setenv("FASTSPARSE_CUDA_ARCHS", "90")
    fake, asks, library = (tmp_path / name for name in ("libtorch_cuda.so", "asks.cu", "asks.so"))
    (tmp_path / "asked.cpp").write_text(ASKED)
    asks.write_text(ASKS)
    named = ("-shared", "-fPIC", f"-Wl,-soname,{fake.name}", "-o", fake)
    subprocess.run([setup.compiler(), *named, tmp_path / "asked.cpp"], check=True)
    jobs, link, libraries = setup.ops_cuda(tmp_path)
    jobs = [job for job in jobs if job[0].name == "edge.cu" or job[0].suffix == ".cpp"]
    jobs.append((asks, tmp_path / "asks.o", jobs[0][2]))
    for source, target, command in jobs:
        subprocess.run([*command, "-c", source, "-o", target], check=True)
    subprocess.run([*link, "-o", library, *(target for _, target, _ in jobs), *libraries], check=True)
    done = subprocess.run(
        [sys.executable, "-c", PRINT, fake, library], check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["68", "69", "71", "68"]
