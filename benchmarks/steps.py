"""One SAE step, forward and backward, in one shape for every contender, so that their gradients can be
compared.

The step is ``mean((x - decode(encode(x - b_dec)))^2)`` and the gradients of all four parameters (Gao et al.
2024, arXiv 2406.04093, section 2). Optimisers are left out: they are the same for everyone.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fastsparse
from benchmarks import data
from benchmarks.checks import TopKOracle
from benchmarks.shapes import Shape

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


@dataclass(frozen=True)
class Parameters:
    """W_enc, W_dec (M, D) with unit rows; b_enc (M,); b_dec (D,)."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor


class Step(ABC):
    """A contender: own copies of the parameters, a loss, and gradients in the common layout.

    Attributes:
        scale: its loss is ``scale`` times the mean square error.
        low: the dtype of autocast around the loss; None for none.
    """

    scale = 1.0
    low: torch.dtype | None = None

    def __init__(self, parameters: Parameters, k: int) -> None:
        self.k = k
        self.leaves = {name: getattr(parameters, name).clone().requires_grad_() for name in NAMES}

    @abstractmethod
    def loss(self, x: Tensor) -> Tensor:
        """Forward, up to the number whose gradients are taken."""

    def run(self, x: Tensor) -> "Step":
        """Forward and backward, as after ``optimizer.step()`` and ``zero_grad(set_to_none=True)``.

        Writing to no rows marks the parameters as changed: nobody gains by keeping what derives from them.
        """
        self.forget()
        for leaf in self.leaves.values():
            leaf.detach()[:0].zero_()
        with torch.autocast(x.device.type, self.low, enabled=self.low is not None):
            loss = self.loss(x)
        loss.backward()
        self.last_loss = loss.detach()
        return self

    def forget(self) -> None:
        """Let the gradients go."""
        for leaf in self.leaves.values():
            leaf.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """By name of :class:`Parameters`, in its layout."""
        return {name: leaf.grad for name, leaf in self.leaves.items()}


class FastsparseStep(Step):
    def loss(self, x: Tensor) -> Tensor:
        p = self.leaves
        values, indices = fastsparse.topk_encode(x - p["b_dec"], p["W_enc"], p["b_enc"], k=self.k)
        return F.mse_loss(fastsparse.sparse_decode(values, indices, p["W_dec"], p["b_dec"]), x)


def dense_loss(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int) -> Tensor:
    """What people write in plain PyTorch: the code as a dense (N, M) matrix."""
    values, indices = torch.topk(torch.relu(F.linear(x - b_dec, W_enc, b_enc)), k)
    latents = values.new_zeros(len(x), len(W_enc)).scatter(1, indices, values)
    return F.mse_loss(latents @ W_dec + b_dec, x)


class DenseStep(Step):
    def loss(self, x: Tensor) -> Tensor:
        return dense_loss(x, **self.leaves, k=self.k)


class CompiledStep(DenseStep):
    def __init__(self, parameters: Parameters, k: int) -> None:
        super().__init__(parameters, k)
        torch._dynamo.reset()
        self.compiled = torch.compile(dense_loss, fullgraph=True, dynamic=False)

    def loss(self, x: Tensor) -> Tensor:
        return self.compiled(x, **self.leaves, k=self.k)


def problem(shape: Shape, kind: str, device: torch.device | str = "cpu") -> tuple[Parameters, Tensor]:
    """Parameters and tokens (N, D) such that every token's k latents are clear of rounding.

    One near-tie decided differently would move a whole row of a gradient; without any, gradients agree to
    rounding.
    """
    weight, b_enc = data.dictionary(shape, kind).to(device), data.bias(shape).to(device)
    b_dec = 0.1 * data.normal(1, shape.D, 21)[0].to(device)
    parts, seed, found = [], 100, 0
    while found < shape.N:
        x = data.tokens(shape, kind, seed).to(device)
        oracle = TopKOracle.of(x - b_dec, weight, b_enc, shape.k)
        gap = oracle.scores[:, -2] - oracle.scores[:, -1]
        positive = oracle.scores[:, -2] > 4 * oracle.tolerance[:, 0]
        kept = x[(gap > 4 * oracle.tolerance[:, 0]) & positive]
        if not len(kept):
            raise ValueError(
                f"problem: no token of {shape} ({kind}) has k latents that are clear of rounding"
            )
        parts.append(kept)
        found, seed = found + len(kept), seed + 10
    return Parameters(weight, b_enc, weight.clone(), b_dec), torch.cat(parts)[: shape.N]
