"""The definition of every op in plain PyTorch: the oracle of all tests, differentiated by PyTorch itself.

Nothing here is fast. Where a kernel and its reference disagree, the reference is right.
"""

from fastsparse.reference.gru_recurrence import gru_recurrence, gru_recurrence_backward
from fastsparse.reference.linear_recurrence import linear_recurrence, linear_recurrence_backward
from fastsparse.reference.lstm_recurrence import lstm_recurrence, lstm_recurrence_backward
from fastsparse.reference.matching_pursuit import matching_pursuit, matching_pursuit_backward
from fastsparse.reference.matching_pursuit_step import matching_pursuit_step
from fastsparse.reference.newton_recurrence import newton_recurrence
from fastsparse.reference.sddmm import sddmm
from fastsparse.reference.spmm import spmm
from fastsparse.reference.spmm_t import spmm_t
from fastsparse.reference.topk_encode import topk_encode

__all__ = [
    "gru_recurrence",
    "gru_recurrence_backward",
    "linear_recurrence",
    "linear_recurrence_backward",
    "lstm_recurrence",
    "lstm_recurrence_backward",
    "matching_pursuit",
    "matching_pursuit_backward",
    "matching_pursuit_step",
    "newton_recurrence",
    "sddmm",
    "spmm",
    "spmm_t",
    "topk_encode",
]
