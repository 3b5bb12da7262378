"""Transposed sparse code times dense matrix: ``out[m]`` sums ``values[n, j] * x[n]`` where indices are m.

A stable sort, PyTorch's, brings the code's entries into latent-major order; every latent's list is then
summed in that order (_list_sums.py). Padding of a ragged code is sorted before all latents, into no list.

Bytes: N k D gathered from ``x``, of which L2 has to hold N x block, and M D written. Scratch memory: about
40 bytes an entry for the sort, and two rows of accumulators a tile, N k D / 32 bytes.
"""

import torch
import triton
import triton.language as tl
from fastsparse.kernels._launch import OPTIONS, Configuration, with_unit_stride
from fastsparse.kernels._list_sums import Lists, check_counts, sum_lists
from fastsparse.kernels._ragged import tokens_of
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Most lists are short, about N k / M entries: few gathers in flight, and wide blocks lest programs be tiny.
CONFIGURATIONS = (Configuration(4, 4), Configuration(2, 4), Configuration(1, 8), Configuration(4, 8))
ENTRIES = 1024  # that a program of _arrange moves


@triton.jit
def _arrange(
    order,
    values,
    owners,
    tokens,
    coefficients,
    entries,
    k,
    value_token_stride,
    value_stride,
    BLOCK: tl.constexpr,
):
    """The token (in ``owners``, or by k) and the coefficient of every entry, in the sorted order."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = entry < entries
    position = tl.load(order + entry, mask=real, other=0).to(tl.int32)
    token, slot = position // k, position % k
    cell = values + token.to(tl.int64) * value_token_stride + slot.to(tl.int64) * value_stride
    value = tl.load(cell, mask=real, other=0)
    if owners is not None:
        token = tl.load(owners + position, mask=real, other=0)
    tl.store(tokens + entry, token, mask=real)
    tl.store(coefficients + entry, value.to(coefficients.dtype.element_ty), mask=real)


def spmm_t(values: Tensor, indices: Tensor, x: Tensor, num_latents: int, offsets: Tensor | None) -> Tensor:
    """``S.T @ x``: values, indices (N, k), or (E,) with offsets (N + 1,); x (N, D); M = num_latents."""
    M, D, entries = num_latents, x.shape[1], indices.numel()
    if entries == 0 or M == 0 or D == 0:
        return x.new_zeros(M, D)
    check_counts("spmm_t", entries, M, "latents")
    x, name = with_unit_stride(x), "spmm_t"
    if offsets is not None:
        name, values, indices = "spmm_t, ragged", values.unsqueeze(1), indices.unsqueeze(1)
    N, k = indices.shape
    lists = _latent_major(values, indices, M, x.shape[0], offsets)
    return sum_lists(lists, x, (name, x.device, x.dtype, N.bit_length(), k, M, D), CONFIGURATIONS)


def _latent_major(values: Tensor, indices: Tensor, M: int, N: int, offsets: Tensor | None) -> Lists:
    """The entries sorted by latent."""
    # The narrower a key, the fewer passes of a radix sort.
    keys = indices.to(torch.int16 if M <= 2**15 else torch.int32).reshape(-1)
    entries, k = indices.numel(), indices.shape[1]
    owners = None
    if offsets is not None:
        owners = tokens_of(offsets, entries)
        keys = keys.masked_fill(owners == N, -1)
    latents, order = keys.sort(stable=True)
    every = torch.arange(-1, M, dtype=keys.dtype, device=keys.device)
    bounds = torch.searchsorted(latents, every, right=True, out_int32=True)
    tokens = torch.empty_like(order, dtype=torch.int32)
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    coefficients = torch.empty_like(order, dtype=wide)
    _arrange[(triton.cdiv(entries, ENTRIES),)](
        order,
        values,
        owners,
        tokens,
        coefficients,
        entries,
        k,
        *values.stride(),
        BLOCK=ENTRIES,
        num_warps=4,
        **OPTIONS,
    )
    return Lists(latents, bounds, tokens, coefficients)
