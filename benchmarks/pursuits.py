"""Matching pursuit as people write it in PyTorch today, and its training step; the problem that all solve.

All atoms have norm 1, and the largest positive ``w @ r`` is taken, as in the training libraries: that is
``nonnegative=True, normalized=True``. Their code takes a negative one where there is no positive one, which
never happens here: with thousands of atoms some atom always points the residual's way.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import fastsparse
from benchmarks import data
from benchmarks.checks import PursuitOracle
from benchmarks.shapes import Shape
from benchmarks.steps import Step
from fastsparse import reference

Steps = tuple[Tensor, Tensor, Tensor]  # values (N, k), indices (N, k), residual (N, D)


def torch_step(residual: Tensor, dictionary: Tensor) -> Steps:
    """One step: value (N,), index (N,), the residual after it. The choice has no gradient."""
    with torch.no_grad():
        index = (residual @ dictionary.T).argmax(dim=1)
    atom = dictionary[index]
    value = (residual * atom).sum(dim=1)
    return value, index, residual - value.unsqueeze(1) * atom


def torch_loop(
    x: Tensor, dictionary: Tensor, k: int, step: Callable[[Tensor, Tensor], Steps] = torch_step
) -> Steps:
    """k products with the whole dictionary."""
    values, indices = [], []
    for _ in range(k):
        value, index, x = step(x, dictionary)
        values.append(value)
        indices.append(index)
    return torch.stack(values, dim=1), torch.stack(indices, dim=1), x


def gram_matrix(dictionary: Tensor) -> Tensor:
    return dictionary @ dictionary.T


def torch_gram_loop(x: Tensor, dictionary: Tensor, k: int, gram: Tensor | None = None) -> Steps:
    """One product, then k rows of the Gram matrix, which is made where none is given. Inference alone."""
    gram = gram_matrix(dictionary) if gram is None else gram
    scores = x @ dictionary.T
    values, indices = [], []
    for _ in range(k):
        value, index = scores.max(dim=1)
        scores.addcmul_(gram.index_select(0, index), value.unsqueeze(1), value=-1)
        values.append(value)
        indices.append(index)
    code = torch.stack(values, dim=1), torch.stack(indices, dim=1)
    return *code, x - F.embedding_bag(code[1], dictionary, mode="sum", per_sample_weights=code[0])


def renew(dictionary: Tensor) -> None:
    """Move one weight by one unit in the last place: nobody may use what he made of the dictionary before.

    Dozens of calls stay within the rounding of one score.
    """
    dictionary.detach().view(torch.int32)[0, 0] += 1


class PursuitStep(Step):
    """A contender's training step: ``mean((x - decode(encode(x - b_dec)))^2)``, and both gradients.

    The dictionary is new in every step, as after an optimiser's.
    """

    def __init__(self, dictionary: Tensor, b_dec: Tensor, k: int) -> None:
        self.k = k
        self.leaves = {
            "dictionary": dictionary.clone().requires_grad_(),
            "b_dec": b_dec.clone().requires_grad_(),
        }

    def run(self, x: Tensor) -> "Step":
        renew(self.leaves["dictionary"])
        return super().run(x)

    def loss(self, x: Tensor) -> Tensor:
        return self.residual(x - self.leaves["b_dec"], self.leaves["dictionary"]).square().mean()

    @abstractmethod
    def residual(self, x: Tensor, dictionary: Tensor) -> Tensor:
        """What is left of x - b_dec."""


class FastsparsePursuitStep(PursuitStep):
    def residual(self, x: Tensor, dictionary: Tensor) -> Tensor:
        return fastsparse.matching_pursuit(
            x, dictionary, k=self.k, nonnegative=True, normalized=True
        ).residual


class TorchPursuitStep(PursuitStep):
    def residual(self, x: Tensor, dictionary: Tensor) -> Tensor:
        return torch_loop(x, dictionary, self.k)[2]


def problem(shape: Shape) -> tuple[Tensor, Tensor, Tensor, PursuitOracle]:
    """Tokens (N, D), dictionary, b_dec, and the pursuit of x - b_dec, all its rows clear of rounding.

    One near-tie decided differently would move rows of the gradient; without any they agree to rounding.
    """
    dictionary, b_dec = data.dictionary(shape, "gaussian"), 0.1 * data.normal(1, shape.D, 21)[0]
    parts, seed, found = [], 100, 0
    while found < shape.N:
        x = data.tokens(replace(shape, N=3 * (shape.N - found) // 2 + 8), "gaussian", seed)
        kept = x[PursuitOracle.of(x - b_dec, dictionary, shape.k, nonnegative=True).clear]
        if not len(kept):
            raise ValueError(f"problem: no token of {shape} has {shape.k} atoms that are clear of rounding")
        parts.append(kept)
        found, seed = found + len(kept), seed + 10
    x = torch.cat(parts)[: shape.N]
    return x, dictionary, b_dec, PursuitOracle.of(x - b_dec, dictionary, shape.k, nonnegative=True)


def expected_gradients(oracle: PursuitOracle) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and both gradients in fp64, from the oracle's steps."""
    residual = oracle.residual
    d_x, d_dictionary = reference.matching_pursuit_backward(
        oracle.values, oracle.indices, residual, oracle.dictionary.double(), torch.zeros_like(oracle.values),
        2 * residual / residual.numel(), True, True, True,
    )  # fmt: skip
    return residual.square().mean(), {"dictionary": d_dictionary, "b_dec": -d_x.sum(dim=0)}
