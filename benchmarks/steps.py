"""One SAE step, forward and backward, in one shape for every contender, so that their gradients can be
compared.

The step is ``mean((x - decode(encode(x - b_dec)))^2)`` and the gradients of all four parameters (Gao et al.
2024, arXiv 2406.04093, section 2). Optimisers are left out: they are the same for everyone.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsparse
from benchmarks import data
from benchmarks.checks import TopKOracle, close_all
from benchmarks.harness import Contender
from benchmarks.lab import compiled
from benchmarks.shapes import Shape

# Of an SAE W_enc, W_dec (M, D) with unit rows, b_enc (M,) and b_dec (D,); of a pursuit dictionary and b_dec.
Parameters = Mapping[str, Tensor]


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
        self.leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}

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

    def gradient(self, name: str) -> Tensor:
        """Of one of :class:`Parameters`, in its layout."""
        return self.leaves[name].grad

    def found(self) -> dict[str, Tensor]:
        """The last loss and gradients, as of the mean square error."""
        gradients = {f"d_{name}": self.gradient(name) / self.scale for name in self.leaves}
        return {"loss": self.last_loss / self.scale} | gradients


class PeerStep(Step):
    """A peer's module, whose parameters take our values; one may be stored transposed."""

    transposed = ""

    def __init__(self, module: nn.Module, leaves: dict[str, nn.Parameter], parameters: Parameters) -> None:
        self.module, self.leaves = module, leaves
        for name, leaf in leaves.items():
            leaf.data = self._turned(name, parameters[name]).contiguous().clone()

    def gradient(self, name: str) -> Tensor:
        return self._turned(name, self.leaves[name].grad)

    def _turned(self, name: str, value: Tensor) -> Tensor:
        return value.T if name == self.transposed else value


class CodeStep(Step):
    """By what encodes ``(x, W_enc, b_enc, k)`` and what decodes ``(values, indices, W_dec)``."""

    encode: Callable[..., tuple[Tensor, Tensor]]
    decode: Callable[..., Tensor]

    def loss(self, x: Tensor) -> Tensor:
        p = self.leaves
        code = self.encode(x - p["b_dec"], p["W_enc"], p["b_enc"], self.k)
        return F.mse_loss(self.decode(*code, p["W_dec"]) + p["b_dec"], x)


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


class CompiledStep(Step):
    def __init__(self, parameters: Parameters, k: int) -> None:
        super().__init__(parameters, k)
        self.compiled = compiled(dense_loss)

    def loss(self, x: Tensor) -> Tensor:
        return self.compiled(x, **self.leaves, k=self.k)


def problem(shape: Shape, device: torch.device | str = "cpu") -> tuple[Parameters, Tensor]:
    """Parameters and tokens (N, D) such that every token's k latents are clear of rounding."""
    weight = data.dictionary(shape, "gaussian").to(device)
    b_enc, b_dec = data.bias(shape).to(device), data.center(shape).to(device)

    def clear(x: Tensor) -> Tensor:
        oracle = TopKOracle.of(x.to(device) - b_dec, weight, b_enc, shape.k)
        last, next_one = oracle.scores[:, -2:].unbind(1)
        return torch.minimum(last - next_one, last) > 4 * oracle.tolerance[:, 0]

    parameters = {"W_enc": weight, "b_enc": b_enc, "W_dec": weight.clone(), "b_dec": b_dec}
    return parameters, clear_tokens(shape, clear).to(device)


def clear_tokens(shape: Shape, clear: Callable[[Tensor], Tensor]) -> Tensor:
    """Tokens (N, D) of which ``clear`` says of each that none of its choices is close.

    One near-tie decided differently would move a whole row of a gradient; without any, gradients agree to
    rounding.
    """
    parts, seed, found = [], 100, 0
    while found < shape.N:
        x = data.tokens(replace(shape, N=3 * (shape.N - found) // 2 + 8), "gaussian", seed)
        parts.append(x[clear(x).to(x.device)])
        if not len(parts[-1]):
            raise ValueError(f"problem: no token of {shape} has {shape.k} latents that are clear of rounding")
        found, seed = found + len(parts[-1]), seed + 10
    return torch.cat(parts)[: shape.N]


def check(expected: dict[str, Tensor], tolerance: float, step: Step) -> str:
    found = step.found()
    return close_all(expected, tolerance, [found[name] for name in expected])


def contender(
    name: str, build: Callable[[], Step], run: Callable[[Step], Step], *rest: Any, **options: Any
) -> Contender:
    """One whose step is built at the first call, in the harness: a peer that is not there is reported."""
    built = cache(build)
    return Contender(name, lambda: run(built()), *rest, **options)
