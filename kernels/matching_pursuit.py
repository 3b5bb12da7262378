"""Matching pursuit in Triton, by products (_pursuit_direct.py) or by a Gram matrix (_pursuit_gram.py).

Both carry residuals in fp32, halves widened once, and choose what exact fp32 scores would.
"""

import os

import torch
from fastsparse.kernels import _pursuit_direct, _pursuit_gram
from fastsparse.kernels._pursuit import Atoms
from torch import Tensor

from fastsparse._options import METHODS, option_at

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def matching_pursuit(
    x: Tensor,
    dictionary: Tensor,
    k: int,
    tol: float,
    nonnegative: bool,
    normalized: bool,
    method: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, D), dictionary (M, D); returns values (N, k), indices (N, k) and the residual (N, D).

    Method "auto" is gram where the products of atoms are fewer than those of residuals that they replace, and
    fit into FASTSPARSE_GRAM_BYTES (csrc/gram.h).
    """
    (N, D), M = x.shape, dictionary.shape[0]
    values, indices = x.new_zeros(N, k), x.new_zeros(N, k, dtype=torch.int64)
    residual = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    chosen = option_at("matching_pursuit", "method", method, METHODS)
    if N * D * k > 0:
        if chosen == "auto":
            chosen = "gram" if N * (k - 1) > M and _gram_limit() >= 4 * M * M else "direct"
        pursue = _pursuit_gram.pursue if chosen == "gram" else _pursuit_direct.pursue
        pursue(residual, Atoms.of(dictionary, normalized), values, indices, tol, nonnegative)
    return values, indices, residual.to(x.dtype)


def _gram_limit() -> int:
    told = os.environ.get("FASTSPARSE_GRAM_BYTES") or str(2**30)
    if not told.isdecimal():
        raise ValueError(f"FASTSPARSE_GRAM_BYTES: must be a number of bytes, at least 0, got {told!r}")
    return int(told)
