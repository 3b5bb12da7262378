"""The three products."""

from dense_products import (
    triton_dense_dense_sparseout_matmul,
    triton_sparse_dense_matmul,
    triton_sparse_transpose_dense_matmul,
)

__all__ = [
    "triton_dense_dense_sparseout_matmul",
    "triton_sparse_dense_matmul",
    "triton_sparse_transpose_dense_matmul",
]
