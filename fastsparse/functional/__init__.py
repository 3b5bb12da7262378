"""What users call: validation, autocast and leading batch dimensions around the ops, a module per family."""

from fastsparse.functional.pursuit import Pursuit, matching_pursuit, matching_pursuit_step
from fastsparse.functional.sparse_codes import TopK, sddmm, sparse_decode, spmm, spmm_t, topk_encode

__all__ = [
    "Pursuit",
    "TopK",
    "matching_pursuit",
    "matching_pursuit_step",
    "sddmm",
    "sparse_decode",
    "spmm",
    "spmm_t",
    "topk_encode",
]
