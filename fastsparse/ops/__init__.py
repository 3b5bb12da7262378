"""The registered ops: schema, shape inference, gradient, and the choice of backend, one module per op."""

from fastsparse.ops.gru_recurrence import gru_recurrence
from fastsparse.ops.linear_recurrence import linear_recurrence
from fastsparse.ops.lstm_recurrence import lstm_recurrence
from fastsparse.ops.matching_pursuit import matching_pursuit
from fastsparse.ops.matching_pursuit_step import matching_pursuit_step
from fastsparse.ops.sddmm import sddmm
from fastsparse.ops.spmm import spmm
from fastsparse.ops.spmm_t import spmm_t
from fastsparse.ops.topk_encode import topk_encode

__all__ = [
    "gru_recurrence",
    "linear_recurrence",
    "lstm_recurrence",
    "matching_pursuit",
    "matching_pursuit_step",
    "sddmm",
    "spmm",
    "spmm_t",
    "topk_encode",
]
