"""The samples of every op in sizes of many blocks, with their gradients, for tests of what needs a GPU."""

from dataclasses import dataclass

import torch
from oracle import random
from samples import CONSTANTS, LARGE, SAMPLES, Sample
from torch import Tensor

import fastsparse
from fastsparse.ops._library import OPS

N, D, M, k = LARGE.N, LARGE.D, LARGE.M, LARGE.k


@dataclass(frozen=True)
class Problem:
    """A sample, and what it and its gradients from ones return for its tensors."""

    sample: Sample

    def __call__(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        names = self.sample.names
        leaves = [
            tensor if name in CONSTANTS else tensor.detach().requires_grad_()
            for name, tensor in zip(names, inputs, strict=True)
        ]
        outs = self.sample.run(LARGE, leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        total = sum(out.sum() for out in outs if out.requires_grad)
        found = torch.autograd.grad(total, wanted, allow_unused=True)
        return *(out.detach() for out in outs), *(grad for grad in found if grad is not None)

    def tensors(
        self, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> list[Tensor]:
        return [tensor.to(device) for tensor in self.sample.make(LARGE, dtype=dtype, seed=seed)]


def _has_kernels(name: str) -> bool:
    op = OPS.get(name.split(",")[0])
    return op is None or bool(op.kernels)


PROBLEMS = {name: Problem(sample) for name, sample in SAMPLES.items() if _has_kernels(name)}


def autoencoder(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """A whole TopK autoencoder's loss."""
    code = fastsparse.topk_encode(x - b_dec, W_enc, b_enc, k=k)
    return (fastsparse.sparse_decode(*code, W_dec, b_dec) - x).square().mean()


def parameters(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """W_enc, b_enc, W_dec, b_dec as leaves."""
    shapes = ((M, D), (M,), (M, D), (D,))
    return [
        random(*shape, seed=i, dtype=dtype, scale=0.1).to(device).requires_grad_()
        for i, shape in enumerate(shapes)
    ]


def same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Equal bit for bit."""
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, expected, strict=True)
    )
