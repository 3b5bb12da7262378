"""Fused, exact, autograd-compatible kernels for sparse encoding in PyTorch."""

from fastsparse.backend import Backend, backends, use_backend
from fastsparse.functional import (
    Pursuit,
    TopK,
    matching_pursuit,
    matching_pursuit_step,
    sddmm,
    sparse_decode,
    spmm,
    spmm_t,
    topk_encode,
)

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "Pursuit",
    "TopK",
    "backends",
    "matching_pursuit",
    "matching_pursuit_step",
    "sddmm",
    "sparse_decode",
    "spmm",
    "spmm_t",
    "topk_encode",
    "use_backend",
]
