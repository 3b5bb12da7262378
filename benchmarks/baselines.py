"""What people run on GPUs today, and the plain ways in PyTorch, restated
in a few lines each, so that nothing need be installed to compare.

Each says what it restates; the peers' own code is measured on CPUs by ``benchmarks/peers``.
"""

from collections.abc import Callable
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.recurrences import Layer
from benchmarks.steps import CodeStep

SPARSIFY = "sparsify's way"
ATOMICS = "openai's way"
FLASHINFER = "linear + flashinfer.top_k"
FLASHRNN = "FlashRNN"
FLASHRNN_HEAD = 64  # the widest that its Triton kernel takes


def linear_scores(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.relu(F.linear(x, weight, bias))


def torch_encode(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What people write today."""
    return torch.topk(linear_scores(x, weight, bias), k)


def torch_batch_encode(x: Tensor, weight: Tensor, bias: Tensor, total: int) -> Tensor:
    """What people write today: the largest of the batch, left where they are in N x M."""
    scores = linear_scores(x, weight, bias).flatten()
    best = scores.topk(total, sorted=False)
    return torch.zeros_like(scores).scatter_(0, best.indices, best.values).view(len(x), -1)


def flashinfer_encode(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """flashinfer selects from a finished N x M matrix."""
    import flashinfer

    return flashinfer.top_k(linear_scores(x, weight, bias), k)


def gather_scores(x: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    """Plain PyTorch's sampled product: gathers N x k x D."""
    return torch.bmm(weight[indices], x.unsqueeze(2)).squeeze(2)


def index_add(values: Tensor, indices: Tensor, x: Tensor, num_latents: int) -> Tensor:
    """Plain PyTorch's spmm_t: N x k x D contributions, added by atomics."""
    contributions = values.unsqueeze(2) * x.unsqueeze(1)
    return x.new_zeros(num_latents, x.shape[1]).index_add_(0, indices.flatten(), contributions.flatten(0, 1))


def torch_decode(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    return F.embedding_bag(indices, weight, mode="sum", per_sample_weights=values.type_as(weight))


def atomic(name: str) -> Callable[..., Tensor]:
    """A function of :mod:`benchmarks.atomics`, which imports Triton."""
    return lambda *arguments: getattr(import_module("benchmarks.atomics"), name)(*arguments)


class _SparsifyEncode(torch.autograd.Function):
    """eai-sparsify's fused encoder: N x M scores forward, N x k x D contributions backward."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, k: int):
        values, indices = torch.topk(linear_scores(x, weight, bias), k, sorted=False)
        ctx.save_for_backward(x, weight, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        x, weight, indices = ctx.saved_tensors
        grad = grad.to(weight.dtype)
        d_bias = torch.zeros_like(weight[:, 0]).index_add_(0, indices.flatten(), grad.flatten())
        d_weight = index_add(grad, indices, x.to(weight.dtype), len(weight))
        return torch_decode(grad, indices, weight), d_weight, d_bias, None


class SparsifyStep(CodeStep):
    """Its encoder, and ``embedding_bag`` for the decoder."""

    encode, decode = staticmethod(_SparsifyEncode.apply), staticmethod(torch_decode)


class AtomicStep(CodeStep):
    """Dense scores, then the sparse products of :mod:`benchmarks.atomics`."""

    encode, decode = staticmethod(atomic("encode")), staticmethod(atomic("decode"))


def flashrnn(layer: Layer) -> Callable[[], list[Tensor]]:
    """An LSTM whose recurrence mixes the channels of a head, in its kernel's only dtype, and its product.

    Its weights are the product's (4 H, H), and by heads the recurrent ones and biases.
    """
    H, device = layer.x.shape[-1], layer.x.device
    head = min(H, FLASHRNN_HEAD)
    shapes = (4 * H, H), (4, H // head, head, head), (4, H // head, head)
    weights = [(torch.randn(shape, device=device) / H**0.5).requires_grad_() for shape in shapes]

    def run() -> list[Tensor]:
        from flashrnn import flashrnn

        product, recurrent, bias = weights
        u = F.linear(layer.x, product).view(*layer.x.shape[:2], *bias.shape)
        low = (part.bfloat16() for part in (u, recurrent, bias))
        states, _ = flashrnn(*low, function="lstm", backend="triton_fused", dtype="bfloat16")
        h = states[0].flatten(-2).type_as(layer.x)
        return [h.detach(), *torch.autograd.grad(h, (layer.x, *weights), layer.upstream)]

    return run
