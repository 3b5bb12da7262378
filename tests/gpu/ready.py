"""``python tests/gpu/ready.py MODULE...``: print the GPU's compute capability, or say all that is missing.

The first step of ``make gpu-test`` and ``make gpu-bench``, with whatever Python the machine has: nothing of
fastsparse is imported.
"""

import importlib.util
import os
import shutil
import sys


def missing(modules: list[str]) -> list[str]:
    """What must be there and isn't, each with what to do about it."""
    faults = []
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    if absent:
        faults.append(
            f"the Python packages {', '.join(absent)}: WHEELS=folder takes them from wheels in a folder"
        )
    nvcc = shutil.which("nvcc") or shutil.which(
        "nvcc", path=os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    )
    if nvcc is None:
        faults.append("nvcc, on PATH or in CUDA_HOME, to build the CUDA kernels")
    if importlib.util.find_spec("torch") is None:
        return ["PyTorch 2.10 or later with CUDA", *faults]
    import torch

    if torch.version.cuda is None:
        faults.insert(0, f"a PyTorch built with CUDA, this one is {torch.__version__}")
    elif not torch.cuda.is_available():
        faults.insert(0, "a CUDA device: PyTorch finds none")
    return faults


def main(modules: list[str]) -> int:
    faults = missing(modules)
    if faults:
        print("needs what this machine doesn't have:", *faults, sep="\n- ", file=sys.stderr)
        return 1
    import torch

    print("{}{}".format(*torch.cuda.get_device_capability()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
