"""What users call: validation, autocast and leading batch dimensions around the ops, a module per family."""

from fastsparse.functional.newton_recurrence import NewtonInfo, newton_recurrence
from fastsparse.functional.pursuit import Pursuit, matching_pursuit, matching_pursuit_step
from fastsparse.functional.recurrences import SolverInfo, gru_recurrence, linear_recurrence, lstm_recurrence
from fastsparse.functional.sparse_codes import TopK, sddmm, sparse_decode, spmm, spmm_t, topk_encode

__all__ = [
    "NewtonInfo",
    "Pursuit",
    "SolverInfo",
    "TopK",
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
]
