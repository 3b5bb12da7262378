"""The sparse products of openai/sparse_autoencoder, under its names, of dense matrices."""

import torch
from torch import Tensor


def triton_sparse_dense_matmul(sparse_indices: Tensor, sparse_values: Tensor, dense: Tensor) -> Tensor:
    return _product(_matrix(sparse_indices, sparse_values, len(dense)), dense).to(sparse_values.dtype)


def triton_sparse_transpose_dense_matmul(
    sparse_indices: Tensor, sparse_values: Tensor, dense: Tensor, N: int, BLOCK_SIZE_AK: int = 128
) -> Tensor:
    return _product(_matrix(sparse_indices, sparse_values, N).T, dense).to(sparse_values.dtype)


def triton_dense_dense_sparseout_matmul(dense1: Tensor, dense2: Tensor, at_indices: Tensor) -> Tensor:
    return _product(dense1, dense2).gather(1, at_indices).to(dense1.dtype)


def _matrix(indices: Tensor, values: Tensor, M: int) -> Tensor:
    wide = torch.promote_types(values.dtype, torch.float32)
    return values.new_zeros(len(values), M, dtype=wide).scatter_add(1, indices, values.to(wide))


def _product(first: Tensor, second: Tensor) -> Tensor:
    """Summed up in fp32 at least, whatever autocast says: as a kernel does."""
    dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    with torch.autocast("cpu", enabled=False):
        return first.to(dtype) @ second.to(dtype)
