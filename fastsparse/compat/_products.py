"""The sparse products of openai/sparse_autoencoder's Triton kernels, which clt-training has too, by our ops.

Those run on GPUs alone; ours also make the libraries work on CPUs. So no work is too little for them.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastsparse.compat._library import RefusedError, Site
from fastsparse.compat._refusals import refuse_unless_plain
from fastsparse.functional import sddmm, spmm, spmm_t


def product_sites(module: str, digests: Sequence[str], optional: bool = False) -> tuple[Site, ...]:
    """The three products of a module: by rows, by columns, and at the places of a code."""
    replacements = {
        "triton_sparse_dense_matmul": _by_rows,
        "triton_sparse_transpose_dense_matmul": _by_columns,
        "triton_dense_dense_sparseout_matmul": _at_places,
    }
    return tuple(
        Site(module, name, digest, replacement, optional)
        for (name, replacement), digest in zip(replacements.items(), digests, strict=True)
    )


def by_columns(indices: Tensor, values: Tensor, rows: Tensor, num_latents: int) -> Tensor:
    """(M, D): the rows (N, D), each times the values (N, k) of its latents, summed up by latent."""
    return _in_widest(lambda v, x: spmm_t(v, indices, x, num_latents), values, rows)


def _by_rows(original, sparse_indices, sparse_values, dense):
    _refuse_unless_code(sparse_indices, sparse_values, dense)
    return _in_widest(lambda v, w: spmm(v, sparse_indices, w), sparse_values, dense)


def _by_columns(original, sparse_indices, sparse_values, dense, N, BLOCK_SIZE_AK=128):
    _refuse_unless_code(sparse_indices, sparse_values, dense)
    return by_columns(sparse_indices, sparse_values, dense, N)


def _at_places(original, dense1, dense2, at_indices):
    _refuse_unless_code(at_indices, at_indices, dense1)
    refuse_unless_plain(dense2)
    return _in_widest(lambda x, w: sddmm(x, w, at_indices), dense1, dense2.T)


def _in_widest(product: Callable, first: Tensor, second: Tensor) -> Tensor:
    """Of two dtypes, as the kernels have it: in the wider one, and then rounded to the first."""
    dtype = torch.promote_types(first.dtype, second.dtype)
    with torch.autocast(first.device.type, enabled=False):
        return product(first.to(dtype), second.to(dtype)).to(first.dtype)


def _refuse_unless_code(indices, values, rows) -> None:
    refuse_unless_plain(indices, values, rows)
    if indices.dim() != 2 or indices.shape != values.shape:
        raise RefusedError("indices and values are not (N, k)")
