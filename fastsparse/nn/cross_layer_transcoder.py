"""The cross-layer transcoder: latents that read one layer and write to it and to all that follow."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsparse._validation import check_count
from fastsparse.functional import BatchTopK, Ragged
from fastsparse.nn._coders import ENCODERS, made_coder, takes_options_of
from fastsparse.nn._composite import Composite
from fastsparse.nn._groups import Group
from fastsparse.nn._joint import largest_in_batch, largest_in_rows
from fastsparse.nn.fvu import spread_of, unexplained
from fastsparse.nn.sparse_autoencoder import Described, Firings, SAELoss, SparseAutoencoder

_NOT_HERE = ("groups", "budgets", "budget_weights", "aux_k", "aux_weight")


@takes_options_of(*ENCODERS, without=_NOT_HERE)
class CrossLayerTranscoder(Composite):
    """A sparse model of what all MLPs of a network make of their inputs, by latents that span layers.

    Of the inputs x^l and outputs y^l of L layers, ``z^l = encoder(W_enc^l x^l + b_enc^l)`` and ``y^t = sum
    over l <= t of z^l W_dec^(l,t) + b_dec^t``. TopK and BatchTopK choose among the latents of all layers
    together. The encoder is that of :class:`TopKSAE`, :class:`BatchTopKSAE` or :class:`JumpReLUSAE`, without
    the centre, and so are the options, but that dead latents are counted and not revived. The fvu is that of
    all layers together: scale those that vary little up before, if they are to count as much.

    The decoders have M D L (L + 1) / 2 weights. For a training step see :class:`SparseAutoencoder`; its loss
    is ``loss(x, y)``.

    Args:
        d_model: D.
        num_latents: M, of each layer.
        k: how many latents of all layers describe a token, as the encoder has it; none with ``"jumprelu"``.
        num_layers: L.
        encoder: ``"topk"``, ``"batchtopk"`` or ``"jumprelu"``.
        device, dtype: of the parameters.
        generator: source of the initial weights, on the parameters' device; default: PyTorch's global one.
        options: of the encoder's class.

    Attributes:
        coders: one for each layer; ``W_enc`` of layer l is (M, D), ``W_dec`` (M, (L - l) D): what its atoms
            add to layer l, and to those that follow. ``b_dec`` (L D,) is the first one's; the others have one
            of zeros, which isn't trained.

    Raises:
        TypeError, ValueError: a size is not a positive integer, or the encoder doesn't take an option.

    Example:
        >>> import torch
        >>> from fastsparse.nn import CrossLayerTranscoder
        >>> model = CrossLayerTranscoder(d_model=8, num_latents=32, k=6, num_layers=3)
        >>> x, y = torch.randn(16, 3, 8), torch.randn(16, 3, 8)
        >>> model(x).shape, sum(code.values.numel() for code in model.encode(x))
        (torch.Size([16, 3, 8]), 96)
        >>> model.loss(x, y).loss.backward()

    Source: Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language Models".
    """

    def __init__(
        self,
        d_model: int,
        num_latents: int,
        k: float | None = None,
        *,
        num_layers: int,
        encoder: str = "topk",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        name = type(self).__name__
        D, L = check_count(name, "d_model", d_model, 1), check_count(name, "num_layers", num_layers, 1)
        for option in options:
            if option in _NOT_HERE:
                raise TypeError(f"{name} has no option {option}, got {options[option]!r}")
        options |= {"device": device, "dtype": dtype, "generator": generator}
        super().__init__(
            encoder,
            [
                made_coder(name, encoder, (D, later * D), num_latents, k, parts=later, **options)
                for later in range(L, 0, -1)
            ],
        )
        self.d_model, self.num_layers = D, L
        for coder in self.coders[1:]:
            coder.b_dec.requires_grad_(False)

    @classmethod
    def sizes_of(cls, inputs: tuple[int, ...], targets: tuple[int, ...] | None) -> dict[str, int]:
        """``d_model`` and ``num_layers``, for tokens and targets (L, D): see :meth:`Model.sizes_of`."""
        if len(inputs) != 2 or targets != inputs:
            raise ValueError(
                f"{cls.__name__} makes targets (N, num_layers, D) of such inputs: it needs both, got "
                f"rows of shape {inputs}, targets {targets}"
            )
        return {"d_model": inputs[1], "num_layers": inputs[0]}

    def init_decoder_bias_(self, x: Tensor, y: Tensor, *, method: str = "geometric_median") -> None:
        """Set ``b_dec`` to the centre of outputs y: :meth:`SparseAutoencoder.init_decoder_bias_`."""
        self._check("init_decoder_bias_", "y", y)
        self.coders[0].init_decoder_bias_(y.flatten(-2), method=method)

    def encode(self, x: Tensor) -> tuple[Ragged | BatchTopK, ...]:
        """Describe tokens (..., L, D) by a few latents each.

        Returns:
            For each layer a ragged code whose rows are the tokens.
        """
        self._check("encode", "x", x)
        return self._chosen([coder.encode(part) for coder, part in self._layers(x)])

    def decode(self, code: Sequence[Ragged | BatchTopK]) -> Tensor:
        """Make outputs (N, L, D) of what :meth:`encode` returned."""
        parts = [coder.decode(part) for coder, part in zip(self.coders, code, strict=True)]
        return _summed(parts).unflatten(-1, (self.num_layers, self.d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Make outputs (..., L, D) of inputs (..., L, D)."""
        return self.decode(self.encode(x)).reshape(x.shape)

    def loss(self, x: Tensor, y: Tensor) -> SAELoss:
        """As :meth:`SparseAutoencoder.loss`, of inputs x and outputs y, both (..., L, D).

        Its code has a part for each layer. l0 and density are those of all layers together, num_dead too.

        Raises:
            TypeError, ValueError: one has the wrong dtype or shape, there is no token, or not as many of one
                as of the other.
        """
        num_dead = int(self.dead.sum())  # first, as in SparseAutoencoder.loss
        self._check("loss", "x", x)
        self._check("loss", "y", y)
        if x.shape != y.shape or x.numel() == 0:
            raise ValueError(
                f"{self._name}.loss: x and y must hold the same number of tokens, at least one, got shapes "
                f"{tuple(x.shape)} and {tuple(y.shape)}"
            )
        target = y.reshape(-1, self.num_layers * self.d_model)
        codes, levels, penalty = self._describe(x.reshape(-1, self.num_layers, self.d_model))
        spread, first = spread_of(target), self.coders[0]
        scores = [unexplained(level, target, spread) for level in levels]
        total = sum(w * score for w, score in zip(first.prefix_weights, scores, strict=True))
        total = total if penalty is None else total + penalty
        none = scores[-1].new_zeros(())
        counts = [coder._counts(code, len(target)) for coder, code in zip(self.coders, codes, strict=True)]
        l0, density = (sum(part) for part in zip(*counts, strict=True))
        told = none if penalty is None else penalty.detach()
        return SAELoss(total, scores[-1].detach(), none, told, l0, density / self.num_layers, num_dead, codes)

    def count_firings_(self, code: Sequence[Ragged | BatchTopK | Firings], *, group: Group = None) -> None:
        """As :meth:`SparseAutoencoder.count_firings_`, of what :meth:`loss` returned."""
        # A token's least value among the latents of one layer says nothing about a threshold.
        count = SparseAutoencoder.count_firings_ if self.encoder == "topk" else None
        for coder, part in zip(self.coders, code, strict=True):
            (count or type(coder).count_firings_)(coder, part, group=group)

    def _describe(self, x: Tensor) -> tuple[tuple, list[Tensor], Tensor | None]:
        """The codes of tokens (N, L, D), the levels of their outputs (N, L D), and the penalty."""
        if self.encoder == "jumprelu":
            found = [coder._describe(part, coder._center(part)) for coder, part in self._layers(x)]
        else:
            codes = self.encode(x)
            found = [
                Described(code, coder._decoded(code)) for coder, code in zip(self.coders, codes, strict=True)
            ]
        levels = [_summed(level) for level in zip(*(about.levels for about in found), strict=True)]
        penalties = [about.penalty for about in found if about.penalty is not None]
        return tuple(about.code for about in found), levels, sum(penalties) if penalties else None

    def _chosen(self, codes: list) -> tuple[Ragged | BatchTopK, ...]:
        """Of the layers' own codes what all of them together choose."""
        if self.encoder == "topk":
            return tuple(largest_in_rows(codes, self.k))
        if isinstance(codes[0], BatchTopK) and len(codes[0].values):
            return tuple(largest_in_batch(codes, len(codes[0].values)))
        return tuple(codes)

    def _layers(self, x: Tensor) -> list[tuple[Any, Tensor]]:
        return list(zip(self.coders, x.unbind(dim=-2), strict=True))

    def _check(self, method: str, argument: str, x: Tensor) -> None:
        self._check_stacks(method, argument, x, "num_layers", self.num_layers, self.d_model)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, num_layers={self.num_layers}, encoder={self.encoder!r}"


def _summed(parts: Sequence[Tensor]) -> Tensor:
    """(N, L D) of what the layers add, (N, L D), (N, (L - 1) D) and so on."""
    D = parts[-1].shape[-1]
    *others, total = parts
    for part in reversed(others):
        total = part + F.pad(total, (D, 0))
    return total
