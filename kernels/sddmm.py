"""Dense times dense, sampled where the code is nonzero: ``out[n, j] = <x[n], weight[indices[n, j]]>``.

A program makes a block of the code's entries, in their order: a 16-byte access a lane for the latent's row
and one for the token's, which the other entries of that token find in L1. Every lane carries its own
columns' sum; lanes are added up at the end.

Bytes: N k D gathered, N D of ``x``. Operations: 2 N k D. So the floor is the gathers over the bandwidth of
HBM, or of L2 where ``weight`` fits into it. To load the token with every entry doubles what L1 has to
deliver, which it can (128 bytes a clock and multiprocessor, against L2's 40), and needs no exchange between
lanes.
"""

import torch
import triton
import triton.language as tl
from fastsparse.kernels._launch import (
    OPTIONS,
    Configuration,
    accumulator,
    block_of_rows,
    tuned,
    with_unit_stride,
)
from fastsparse.kernels._ragged import tokens_of
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Of as many warps each: a row that isn't aligned is spread over all of them, and its sum's order with it.
CONFIGURATIONS = (Configuration(4, 4), Configuration(4, 2))


@triton.jit
def _sddmm(
    x,
    weight,
    indices,
    owners,
    out,
    entries,
    N,
    k,
    D,
    x_stride,
    weight_stride,
    index_token_stride,
    index_stride,
    ACCUMULATOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    real = tl.arange(0, BLOCK) < entries - begin
    first_token = begin // k
    ahead = (begin - first_token * k).to(tl.int32) + tl.arange(0, BLOCK)
    n = first_token + ahead // k
    slot = (ahead % k).to(tl.int64)
    latent = tl.load(indices + n * index_token_stride + slot * index_stride, mask=real, other=0)
    live = real
    if owners is not None:
        n = tl.load(owners + n, mask=real, other=0).to(tl.int64)
        live = real & (n < N)  # the others are padding
    tokens = x + (n * x_stride)[:, None]
    atoms = weight + (latent * weight_stride)[:, None]
    total = tl.full([BLOCK, BLOCK_D], 0, ACCUMULATOR)
    for first in range(0, D, BLOCK_D):
        columns = (first + tl.arange(0, BLOCK_D))[None, :]
        inside = live[:, None] & (columns < D)
        token = tl.load(tokens + columns, mask=inside, other=0).to(ACCUMULATOR)
        total += token * tl.load(atoms + columns, mask=inside, other=0).to(ACCUMULATOR)
    tl.store(out + begin + tl.arange(0, BLOCK), tl.sum(total, axis=1).to(out.dtype.element_ty), mask=real)


def sddmm(x: Tensor, weight: Tensor, indices: Tensor, offsets: Tensor | None) -> Tensor:
    """``(x @ weight.T)`` at ``indices`` (N, k), or (E,) with offsets (N + 1,); x (N, D); weight (M, D)."""
    (N, D), M, dtype = x.shape, weight.shape[0], x.dtype
    if D == 0:
        return x.new_zeros(indices.shape)
    out, name, owners = x.new_empty(indices.shape), "sddmm", None
    if out.numel() == 0:
        return out
    if offsets is not None:  # a token an entry
        name, indices, owners = "sddmm, ragged", indices.unsqueeze(1), tokens_of(offsets, indices.numel())
    total, k = indices.numel(), indices.shape[1]
    x, weight = with_unit_stride(x), with_unit_stride(weight)

    def launch(configuration: Configuration) -> None:
        entries, columns = _block(D, dtype, configuration)
        _sddmm[(triton.cdiv(total, entries),)](
            x,
            weight,
            indices,
            owners,
            out,
            total,
            N,
            k,
            D,
            x.stride(0),
            weight.stride(0),
            *indices.stride(),
            ACCUMULATOR=accumulator(dtype),
            BLOCK=entries,
            BLOCK_D=columns,
            num_warps=configuration.warps,
            **OPTIONS,
        )

    tuned((name, x.device, dtype, indices.shape[0].bit_length(), k, M, D), CONFIGURATIONS, launch)
    return out


def _block(D: int, dtype: torch.dtype, configuration: Configuration) -> tuple[int, int]:
    """Entries and columns of a program's block: one warp's columns, so that a warp has whole rows."""
    rows, columns = block_of_rows(D, dtype, 1)
    return rows * configuration.warps * max(1, configuration.unroll // rows), columns
