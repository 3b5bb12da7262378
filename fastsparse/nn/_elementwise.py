"""Autoencoders whose latents are functions of their own scores alone: how many there are is not fixed."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from fastsparse import ops
from fastsparse._options import position_of
from fastsparse.functional import Ragged, sparse_decode, threshold_encode
from fastsparse.functional._tensors import flat
from fastsparse.nn._groups import Group, counting_group
from fastsparse.nn._linear_encoder import LinearEncoder
from fastsparse.nn._stripes import Activated, in_stripes
from fastsparse.nn.sparse_autoencoder import Code, Described, Firings

# The density above which a loss is computed in stripes. On CPUs entries are faster up to 0.3 and more
# (benchmarks/bench_encoder_steps.py), but from there on they take more memory than all scores would. On GPUs,
# none of which has been measured, products of matrices are faster by the roofline from 0.01 on.
_CROSSOVER = {"cpu": 0.2}
_CROSSOVER_OF_GPUS = 0.01


class Elementwise(LinearEncoder):
    """Described by all scores above a bound of their latent's; costs of theirs are the penalty.

    What goes into the loss is either the entries of a ragged code or, as long as these are many, stripes of
    the dense one: the same function, within rounding. ``dense="auto"`` goes by how many there were in the
    step that was counted last. A new model is taken to be dense, as about half of its scores are positive,
    too many for entries; if it is not, the first step that is counted says so.

    Attributes:
        density: scalar fp32 buffer, the share of the pre-activations that were entries; 1 before any step.
    """

    density: Tensor
    _wide = ("density",)

    def __init__(self, *sizes: int, dense: str, device: torch.device | str | None, **options: Any) -> None:
        super().__init__(*sizes, device=device, **options)
        position_of(self._name, "dense", dense, ("auto", "sparse", "stripes"))
        self.dense = dense
        self.register_buffer("density", torch.ones((), dtype=torch.float32, device=device))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new atoms, and start again from them."""
        super().reset_parameters(generator)
        self.density.fill_(1)

    def encode(self, x: Tensor) -> Ragged:
        """Describe tokens by their active latents.

        Args:
            x: (..., D), the dtype of the parameters, or one that it covers.

        Returns:
            :class:`fastsparse.Ragged` ``(values, indices, offsets)``, whose rows are the tokens. Gradients
            reach the values of active latents only.

        Raises:
            RuntimeError: there are more entries than there is memory for, as of a model that has diverged.
        """
        centered = flat(self._center(x))
        code = self._scores(centered, self._threshold())
        return code._replace(values=code.values.to(centered.dtype))

    def _describe(self, x: Tensor, centered: Tensor) -> Described:
        most = _CROSSOVER.get(x.device.type, _CROSSOVER_OF_GPUS)
        stripes = self.dense == "stripes" or (self.dense == "auto" and bool(self.density > most))
        return (self._by_stripes if stripes else self._by_entries)(x, centered)

    def _by_entries(self, x: Tensor, centered: Tensor) -> Described:
        scores, (values, costs, gates) = self._entries(centered)
        _, indices, offsets = scores
        code = Ragged(values.to(centered.dtype), indices, offsets)
        sums = [_sum_of_rows(cost, scores, self.num_latents) for cost in costs]
        gated = None
        if gates is not None:
            added = sparse_decode(gates.to(centered.dtype), indices, self.W_dec.detach(), None, offsets)
            gated = self._expanded(added, frozen=True) + self.b_dec.detach()
        return Described(code, self._decoded(code), self._penalty(x, centered, sums, gated))

    def _by_stripes(self, x: Tensor, centered: Tensor) -> Described:
        levels, costs, gated, fired, entries = in_stripes(
            centered, self.W_enc, self.b_enc, self.W_dec, self._bounds(), self._terms(), self._activate,
            (*self.prefixes, self.num_latents),
        )  # fmt: skip
        if gated is not None:
            gated = self._expanded(gated, frozen=True) + self.b_dec.detach()
        return Described(
            Firings(fired, len(x), entries),
            [self._expanded(level) + self.b_dec for level in levels],
            self._penalty(x, centered, costs, gated),
        )

    def _entries(self, centered: Tensor) -> tuple[Ragged, Activated]:
        """The scores of tokens (N, D) that count, and what they become."""
        scores = self._scores(centered, self._bounds())
        return scores, self._activate(scores.values, *(_at(term, scores) for term in self._terms()))

    def _scores(self, centered: Tensor, above: Tensor) -> Ragged:
        """Those of tokens (N, D) above the latents' thresholds, in the type that sums are carried in."""
        return threshold_encode(centered, self.W_enc, self.b_enc, threshold=above)

    def _threshold(self) -> Tensor:
        """(M,) without a gradient, what the scores of active latents exceed."""
        return torch.zeros_like(self._widened(self.b_enc.detach()))

    def _bounds(self) -> Tensor:
        """(M,), what scores exceed that count for the loss."""
        return self._threshold()

    @abstractmethod
    def _terms(self) -> Sequence[Tensor]:
        """(M,) each, in the type that sums are carried in: what latents' activations depend on."""

    @abstractmethod
    def _activate(self, scores: Tensor, *terms: Tensor) -> Activated:
        """What scores become, by the terms of their latents, of a shape that broadcasts to theirs."""

    @abstractmethod
    def _penalty(self, x: Tensor, centered: Tensor, costs: Sequence[Tensor], gated: Tensor | None) -> Tensor:
        """Of tokens (N, D), the sums of whose costs are (N,) each, and which gates reconstruct so."""

    @torch.no_grad()
    def count_firings_(self, code: Code | Firings, *, group: Group = None) -> None:
        """As :meth:`SparseAutoencoder.count_firings_`, and how dense the step was."""
        super().count_firings_(code, group=group)
        if isinstance(code, Firings):
            entries, num_tokens = code.num_entries, code.num_tokens
        elif isinstance(code, Ragged):
            entries, num_tokens = code.values.numel(), code.offsets.shape[0] - 1
        else:  # of another encoder
            return
        told = torch.tensor([float(entries), float(num_tokens)], device=self.density.device)
        if (processes := counting_group(f"{self._name}.count_firings_", group)) is not None:
            distributed.all_reduce(told, group=processes)
        self.density.copy_(told[0] / (told[1].clamp_min(1) * self.num_latents))

    def _norms(self) -> Tensor:
        """(M,) of the atoms."""
        return torch.linalg.vector_norm(self._widened(self._atoms()), dim=1)

    @staticmethod
    def _widened(tensor: Tensor) -> Tensor:
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dense={self.dense!r}"


def _at(term: Tensor, code: Ragged) -> Tensor:
    """(M,) at the entries of a code; sums of its gradient have a fixed order, those of an index have not.

    By the op, which autocast leaves alone.
    """
    ones = term.new_ones(code.offsets.shape[0] - 1, 1)
    return ops.sddmm(ones, term.unsqueeze(1), code.indices, code.offsets)


def _sum_of_rows(entries: Tensor, code: Ragged, num_latents: int) -> Tensor:
    """(N,) of a code's entries."""
    return ops.spmm(entries, code.indices, entries.new_ones(num_latents, 1), code.offsets).squeeze(1)
