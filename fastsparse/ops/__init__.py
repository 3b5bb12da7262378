"""The registered ops: schema, shape inference, gradient, and the choice of backend, one module per op."""

from fastsparse.ops.sddmm import sddmm
from fastsparse.ops.spmm import spmm
from fastsparse.ops.spmm_t import spmm_t
from fastsparse.ops.topk_encode import topk_encode

__all__ = ["sddmm", "spmm", "spmm_t", "topk_encode"]
