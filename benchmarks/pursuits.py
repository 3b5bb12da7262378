"""Matching pursuit as people write it in PyTorch today, and its training step; the problem that all solve.

All atoms have norm 1, and the largest positive ``w @ r`` is taken, as in the training libraries: that is
``nonnegative=True, normalized=True``. Their code takes a negative one where there is no positive one, which
never happens here: with thousands of atoms some atom always points the residual's way.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastsparse
from benchmarks import data
from benchmarks.checks import PursuitOracle
from benchmarks.shapes import Shape
from benchmarks.steps import Parameters, Step, clear_tokens
from fastsparse import reference

Steps = tuple[Tensor, Tensor, Tensor]  # values (N, k), indices (N, k), residual (N, D)


def encode(x: Tensor, dictionary: Tensor, k: int, method: str = "auto") -> Steps:
    return fastsparse.matching_pursuit(x, dictionary, k=k, nonnegative=True, normalized=True, method=method)


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

    def step(scores: Tensor, _: Tensor) -> Steps:
        value, index = scores.max(dim=1)
        return value, index, scores.addcmul_(gram.index_select(0, index), value.unsqueeze(1), value=-1)

    values, indices, _ = torch_loop(x @ dictionary.T, dictionary, k, step)
    return values, indices, x - F.embedding_bag(indices, dictionary, mode="sum", per_sample_weights=values)


def renew(dictionary: Tensor) -> None:
    """Move one weight by one unit in the last place: nobody may use what he made of the dictionary before.

    Dozens of calls stay within the rounding of one score.
    """
    dictionary.detach().view(torch.int32)[0, 0] += 1


class PursuitStep(Step):
    """A contender's training step: ``mean((x - decode(encode(x - b_dec)))^2)``, and both gradients.

    The dictionary is new in every step, as after an optimiser's.
    """

    def run(self, x: Tensor) -> Step:
        renew(self.leaves["dictionary"])
        return super().run(x)


class ResidualStep(PursuitStep):
    """Of an encoder that returns what is left of x - b_dec."""

    def __init__(
        self, encode: Callable[[Tensor, Tensor, int], Steps], parameters: Parameters, k: int
    ) -> None:
        super().__init__(parameters, k)
        self.encode = encode

    def loss(self, x: Tensor) -> Tensor:
        return self.encode(x - self.leaves["b_dec"], self.leaves["dictionary"], self.k)[2].square().mean()


def problem(shape: Shape) -> tuple[Parameters, Tensor, PursuitOracle]:
    """Dictionary and b_dec, tokens (N, D), and the pursuit of x - b_dec, all its rows clear of rounding."""
    dictionary, b_dec = data.dictionary(shape, "gaussian"), data.center(shape)

    def pursuit(x: Tensor) -> PursuitOracle:
        return PursuitOracle.of(x - b_dec, dictionary, shape.k, nonnegative=True)

    x = clear_tokens(shape, lambda x: pursuit(x).clear)
    return {"dictionary": dictionary, "b_dec": b_dec}, x, pursuit(x)


def expected_gradients(oracle: PursuitOracle) -> dict[str, Tensor]:
    """The loss and both gradients in fp64, from the oracle's steps."""
    residual = oracle.residual
    d_x, d_dictionary = reference.matching_pursuit_backward(
        oracle.values, oracle.indices, residual, oracle.dictionary.double(), torch.zeros_like(oracle.values),
        2 * residual / residual.numel(), True, True, True,
    )  # fmt: skip
    return {"loss": residual.square().mean(), "d_dictionary": d_dictionary, "d_b_dec": -d_x.sum(dim=0)}
