"""The autoencoders that the experiments compare, all trained the same way."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

import fastsparse
from fastsparse.nn import MatchingPursuitSAE, Model, TopKSAE, fvu

WARM_DOWN = 0.3  # the share of the steps over which the learning rate falls to 0


class TopK(TopKSAE):
    """The TopK autoencoder, also with one matrix for both directions, with signed values, and at any k.

    Args:
        tied: encode by the decoder's atoms, as matching pursuit does.
        signed: select on the absolute value and keep the sign, as signed matching pursuit does.
    """

    def __init__(self, *sizes: int, tied: bool = False, signed: bool = False, **options) -> None:
        super().__init__(*sizes, activation="abs" if signed else "relu", **options)
        if tied:
            self.W_enc = self.W_dec

    def encode(self, x: Tensor, k: int | None = None) -> fastsparse.TopK:
        return self._encode(self._center(x), self.k if k is None else k)


Autoencoder = MatchingPursuitSAE | TopK
Kind = TypeVar("Kind", bound=Model)


def train(sae: Kind, batch: Callable[[], Tensor | tuple[Tensor, ...]], *, steps: int, lr: float) -> Kind:
    """Adam on batches, each drawn by a call of ``batch``; returns the model, out of training mode."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (steps - step) / (WARM_DOWN * steps))
        optimizer.zero_grad()
        drawn = batch()
        out = sae.loss(*drawn) if isinstance(drawn, tuple) else sae.loss(drawn)
        out.loss.backward()
        sae.after_backward_()
        optimizer.step()
        sae.after_step_()
        sae.count_firings_(out.code)
    return sae.eval()


def best(
    make: Callable[[], Autoencoder],
    batch: Callable[[], Callable[[], Tensor]],
    validation: Tensor,
    *,
    rates: tuple[float, ...],
    steps: int,
) -> tuple[Autoencoder, float]:
    """The autoencoder with the least FVU on ``validation`` of one trained at each rate, and its rate.

    ``make`` and ``batch`` start anew at every call: only the rate differs.
    """  # fmt: skip
    trained = [(train(make(), batch(), steps=steps, lr=rate), rate) for rate in rates]
    return min(trained, key=lambda pair: unexplained(pair[0], validation, pair[0].k))


@torch.no_grad()
def unexplained(sae: Autoencoder, x: Tensor, k: int) -> float:
    """The fraction of the variance of x (N, D) that k latents a token leave unexplained."""
    return float(fvu(sae.decode(sae.encode(x, k=k)), x))


def seeded(*seeds: int) -> torch.Generator:
    """A generator for each combination of seeds.

    Example:
        >>> torch.equal(torch.rand(3, generator=seeded(1, 2)), torch.rand(3, generator=seeded(2, 1)))
        False
    """
    seed = 0
    for part in seeds:
        seed = seed * 1009 + part + 1
    return torch.Generator().manual_seed(seed)
