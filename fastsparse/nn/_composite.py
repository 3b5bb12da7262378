"""Models made of coders, each an encoder with a decoder."""

from collections.abc import Iterable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from fastsparse._validation import check_float
from fastsparse.nn._coders import options_of
from fastsparse.nn._groups import Group
from fastsparse.nn._linear_encoder import LinearEncoder
from fastsparse.nn._model import Model
from fastsparse.nn.sparse_autoencoder import Code, Firings


class Composite(Model):
    """What a model does by each of its coders doing it.

    Attributes:
        coders: the encoders with their decoders, whose parameters are those of an autoencoder.
        encoder: of what kind they are.
        num_latents: M, of each.
    """

    def __init__(self, encoder: str, coders: Iterable[LinearEncoder]) -> None:
        super().__init__()
        self.encoder, self.coders = encoder, nn.ModuleList(coders)
        self.num_latents = self.coders[0].num_latents

    @property
    def k(self) -> float | None:
        """How many latents describe a token; None where the encoder doesn't fix it."""
        return getattr(self.coders[0], "k", None)

    @property
    def dead(self) -> Tensor:
        """(M,) bool, of several coders (number, M): as :attr:`SparseAutoencoder.dead`."""
        return torch.stack([coder.dead for coder in self.coders]).squeeze(0)

    @property
    def tokens_since_fired(self) -> Tensor:
        """(M,) int64, of several coders (number, M): a copy of what theirs are."""
        return torch.stack([coder.tokens_since_fired for coder in self.coders]).squeeze(0)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new atoms, and start again from them."""
        for coder in self.coders:
            coder.reset_parameters(generator)

    def count_firings_(self, code: Code | Firings, *, group: Group = None) -> None:
        """As :meth:`SparseAutoencoder.count_firings_`, of what :meth:`loss` returned."""
        codes = (code,) if len(self.coders) == 1 else code
        for coder, part in zip(self.coders, codes, strict=True):
            coder.count_firings_(part, group=group)

    def after_backward_(self) -> None:
        """What a training step does between ``backward`` and the optimiser's step."""
        for coder in self.coders:
            coder.after_backward_()

    def after_step_(self) -> None:
        """What a training step does after the optimiser's step."""
        for coder in self.coders:
            coder.after_step_()

    def options(self) -> dict[str, Any]:
        """What a model like this one is made with: all but its device, dtype and generator."""
        taken = signature(type(self)).parameters
        told = options_of(self.coders[0], self.encoder)
        told |= {name: getattr(self, name) for name in taken if hasattr(self, name) and name != "generator"}
        return {name: told[name] for name in taken if name in told}

    def _check_stacks(self, method: str, argument: str, x: Tensor, number: str, count: int, D: int) -> None:
        """Tokens (..., count, D) of as many sources or layers as there must be."""
        name = f"{self._name}.{method}"
        check_float(name, argument, x)
        if x.dim() < 2 or x.shape[-2:] != (count, D):
            raise ValueError(
                f"{name}: {argument} must have shape (..., {number}, D) with {number} = {count}, D = {D}, "
                f"got shape {tuple(x.shape)}"
            )
