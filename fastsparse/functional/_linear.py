"""``F.linear`` by the library that multiplies fastest: no product of ours."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fastsparse.backend import _cpu

MUCH = 1 << 22  # multiplications, of which fewer take less time than is to be had


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, to rounding what ``F.linear`` says; so are its derivatives, of every order.

    PyTorch gives fp32 products on CPUs to MKL, which on AMD processors with AVX-512 reaches less than half of
    the rate of oneDNN, which PyTorch has too. Plain fp32 products of some size go there.

    Args:
        x: (..., D).
        weight: (M, D).
        bias: (M,).
    """
    if not _serves(x, weight, bias):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        if not (weight.is_contiguous() or weight.T.is_contiguous()):
            weight = weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows, grads = x.flatten(0, -2), grad.flatten(0, -2)
        return (
            linear(grad, weight.T) if needs_x else None,
            outer(grads, rows) if needs_weight else None,
            grads.sum(0) if needs_bias else None,
        )


def outer(a: Tensor, b: Tensor) -> Tensor:
    """``a.T @ b`` of a (N, M) and b (N, D). The narrower one is the one that is copied, across."""
    if a.shape[1] > b.shape[1]:
        return linear(b.T, a.T).T.contiguous()
    return linear(a.T, b.T)


def _serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        not torch.compiler.is_compiling()  # whose own choice is the same
        and _cpu.prefers_onednn
        and all(
            type(tensor) in (Tensor, torch.nn.Parameter)
            and tensor.dtype == torch.float32
            and tensor.device.type == "cpu"
            and tensor.layout == torch.strided
            for tensor in tensors
        )
        and x.dim() > 1
        and x.numel() * weight.shape[0] >= MUCH
        and x.shape[-1] == weight.shape[-1]  # F.linear says what is wrong
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and forward_ad._current_level < 0
    )
