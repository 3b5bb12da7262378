"""Sparse code times dense matrix: ``out[n] = sum_j values[n, j] * weight[indices[n, j]]``.

A program makes a block of columns of one row (of several where D is small): a 16-byte access a lane and
gathered row, several rows in flight. Programs run through all tokens for one block of columns before the
next: what is gathered meanwhile, M x block, is what L2 has to hold, not all of ``weight``.

Bytes: N k D gathered, N D written, N k (8 + element) read for every block of columns (at k = 64 under 4 %).
Operations: 2 N k D, far below what the machine could. So the floor is the gathers over the bandwidth of L2,
or, where a block of ``weight`` doesn't fit into it, of HBM.

The tokens of a ragged code are lists (_list_sums.py): their entries are shared out, however many a token has.
"""

import torch
import triton
import triton.language as tl
from fastsparse.kernels._gather_sum import gather_sum
from fastsparse.kernels._launch import (
    OPTIONS,
    Configuration,
    accumulator,
    block_of_rows,
    tuned,
    with_unit_stride,
)
from fastsparse.kernels._list_sums import Lists, check_counts, sum_lists
from fastsparse.kernels._ragged import tokens_of
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Narrow blocks of columns stay in L2, wide ones read the code less often; more gathers in flight hide more
# latency and take registers.
CONFIGURATIONS = (Configuration(4, 4), Configuration(1, 8), Configuration(2, 8), Configuration(1, 16))


@triton.jit
def _spmm(
    values,
    indices,
    weight,
    out,
    N,
    k,
    D,
    value_token_stride,
    value_stride,
    index_token_stride,
    index_stride,
    weight_stride,
    ACCUMULATOR: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    n = (program % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = program // blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    total = gather_sum(
        values + n * value_token_stride,
        value_stride,
        indices + n * index_token_stride,
        index_stride,
        tl.where(n < N, k, 0),
        k,
        weight,
        weight_stride,
        columns,
        columns < D,
        ACCUMULATOR,
        UNROLL,
    )
    inside = (n < N)[:, None] & (columns < D)[None, :]
    tl.store(out + (n * D)[:, None] + columns[None, :], total.to(out.dtype.element_ty), mask=inside)


def spmm(values: Tensor, indices: Tensor, weight: Tensor, offsets: Tensor | None) -> Tensor:
    """``S @ weight``: values, indices (N, k), or (E,) with offsets (N + 1,); weight (M, D)."""
    if offsets is not None:
        return _of_lists(values, indices, with_unit_stride(weight), offsets)
    (N, k), (M, D), dtype = values.shape, weight.shape, weight.dtype
    if k == 0:
        return weight.new_zeros(N, D)
    out = weight.new_empty(N, D)
    if out.numel() == 0:
        return out
    weight = with_unit_stride(weight)

    def launch(configuration: Configuration) -> None:
        rows, columns = block_of_rows(D, dtype, configuration.warps)
        _spmm[(triton.cdiv(N, rows) * triton.cdiv(D, columns),)](
            values,
            indices,
            weight,
            out,
            N,
            k,
            D,
            *values.stride(),
            *indices.stride(),
            weight.stride(0),
            ACCUMULATOR=accumulator(dtype),
            UNROLL=configuration.unroll,
            BLOCK_N=rows,
            BLOCK_D=columns,
            num_warps=configuration.warps,
            **OPTIONS,
        )

    tuned(("spmm", weight.device, dtype, N.bit_length(), k, M, D), CONFIGURATIONS, launch)
    return out


def _of_lists(values: Tensor, indices: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """The same of a ragged code, whose tokens are lists."""
    entries, N, (M, D) = indices.numel(), offsets.numel() - 1, weight.shape
    if entries == 0 or N == 0 or D == 0:
        return weight.new_zeros(N, D)
    check_counts("spmm", entries, N, "tokens")
    bounds = offsets.clamp(0, entries).to(torch.int32)
    lists = Lists(tokens_of(offsets, entries), bounds, indices.contiguous(), values.contiguous())
    key = ("spmm, ragged", weight.device, weight.dtype, entries.bit_length(), N.bit_length(), M, D)
    return sum_lists(lists, weight, key, CONFIGURATIONS)
