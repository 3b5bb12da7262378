"""Fused, exact, autograd-compatible kernels for sparse encoding in PyTorch."""

from fastsparse.backend import Backend, backends, use_backend
from fastsparse.functional import (
    NewtonInfo,
    Pursuit,
    SolverInfo,
    TopK,
    gru_recurrence,
    linear_recurrence,
    lstm_recurrence,
    matching_pursuit,
    matching_pursuit_step,
    newton_recurrence,
    sddmm,
    sparse_decode,
    spmm,
    spmm_t,
    topk_encode,
)

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "NewtonInfo",
    "Pursuit",
    "SolverInfo",
    "TopK",
    "backends",
    "gru_recurrence",
    "linear_recurrence",
    "lstm_recurrence",
    "matching_pursuit",
    "matching_pursuit_step",
    "newton_recurrence",
    "sddmm",
    "sparse_decode",
    "spmm",
    "spmm_t",
    "topk_encode",
    "use_backend",
]
