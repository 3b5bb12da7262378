"""Sparse products with one atomic addition for every number: how the first Triton SAE kernels were made.

The three products of Gao et al. 2024 (arXiv 2406.04093, appendix D.2), in our own words and without our
care: one program a token, a loop over its latents, and a dense gradient that every token adds to by
floating-point atomics, in whatever order the device runs them. The code is a list of coordinates, the dense
sides are contiguous. A baseline: nothing of fastsparse runs on it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _decode(values, indices, weight, out, k, D, BLOCK: tl.constexpr):
    n, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = columns < D
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(k):
        atom = tl.load(weight + tl.load(indices + n * k + j) * D + columns, mask=inside, other=0.0)
        total += tl.load(values + n * k + j).to(tl.float32) * atom.to(tl.float32)
    tl.store(out + n * D + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _score(x, weight, indices, out, k, D, BLOCK: tl.constexpr):
    n, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = columns < D
    token = tl.load(x + n * D + columns, mask=inside, other=0.0).to(tl.float32)
    for j in range(k):
        atom = tl.load(weight + tl.load(indices + n * k + j) * D + columns, mask=inside, other=0.0)
        tl.store(out + n * k + j, tl.sum(token * atom.to(tl.float32)).to(out.dtype.element_ty))


@triton.jit
def _scatter(values, indices, x, out, k, D, BLOCK: tl.constexpr):
    entry, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = columns < D
    token = tl.load(x + entry // k * D + columns, mask=inside, other=0.0).to(tl.float32)
    term = tl.load(values + entry).to(tl.float32) * token
    tl.atomic_add(out + tl.load(indices + entry) * D + columns, term, mask=inside, sem="relaxed")


def _launch(kernel, programs: int, inputs: tuple[Tensor, ...], out: Tensor, k: int, D: int) -> Tensor:
    kernel[(programs,)](*(part.contiguous() for part in inputs), out, k, D, triton.next_power_of_2(D))
    return out


def _decoded(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """values, indices (N, k); weight (M, D); returns (N, D)."""
    (N, k), D = indices.shape, weight.shape[1]
    return _launch(_decode, N, (values, indices, weight), weight.new_empty(N, D), k, D)


def score(x: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """x (N, D); weight (M, D); indices (N, k); returns (N, k)."""
    (N, k), D = indices.shape, weight.shape[1]
    return _launch(_score, N, (x, weight, indices), x.new_empty(N, k), k, D)


def scatter(values: Tensor, indices: Tensor, x: Tensor, num_latents: int) -> Tensor:
    """values, indices (N, k); x (N, D); returns (M, D)."""
    (N, k), D = indices.shape, x.shape[1]
    out = x.new_zeros(num_latents, D, dtype=torch.float32)
    return _launch(_scatter, N * k, (values, indices, x), out, k, D).to(x.dtype)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, weight)
        return _decoded(values, indices, weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        values, indices, weight = ctx.saved_tensors
        return score(grad, weight, indices), None, scatter(values, indices, grad, len(weight))


class _Encode(torch.autograd.Function):
    """Dense scores, the k largest of each row, and sparse gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, k: int):
        values, indices = torch.topk(torch.relu(torch.nn.functional.linear(x, weight, bias)), k)
        ctx.save_for_backward(x, weight, indices, values)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        x, weight, indices, values = ctx.saved_tensors
        grad = (grad * (values > 0)).to(x.dtype)
        d_bias = torch.zeros_like(weight[:, 0]).index_add_(0, indices.flatten(), grad.flatten())
        return _decoded(grad, indices, weight), scatter(grad, indices, x, len(weight)), d_bias, None


def decode(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    return _Decode.apply(values.type_as(weight), indices, weight)


encode = _Encode.apply
