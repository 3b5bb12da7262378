"""The group-sparse autoencoder: views of the same thing by different senses, in latents that they share."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsparse._validation import check_count, check_flag, whole_number
from fastsparse.functional import TopK, sddmm, topk_encode
from fastsparse.nn._coders import made_coder, takes_options_of
from fastsparse.nn._composite import Composite
from fastsparse.nn._groups import Group
from fastsparse.nn._masked_topk import masked_topk
from fastsparse.nn._philox import kept
from fastsparse.nn.fvu import spread_of
from fastsparse.nn.sparse_autoencoder import Described, SAELoss

_NOT_HERE = ("activation", "groups", "budgets", "budget_weights", "threshold_decay")


@takes_options_of("topk", without=_NOT_HERE)
class GroupSparseSAE(Composite):
    """An autoencoder for each of several modalities, whose latents are drawn to mean the same in all.

    Of a pair (or more) of tokens that belong together, such as an image and its caption, each is described by
    its own k strongest latents, and latent m of one modality is to be active where latent m of the others
    is. Two things see to it. In training a latent is masked, in all modalities of a pair at once, with
    ``mask_probability``: latents of other pairs take its place. And the loss has the penalty
    ``group_weight * sum over latents of sqrt(sum over modalities of value^2)``, a mean over pairs, which is
    less where modalities share their latents. It is added to the fvu; the paper adds it to the squared error.

    With ``shared_support`` all modalities have the same latents: those of the largest positive sums of
    scores.

    For a training step see :class:`SparseAutoencoder`.

    Args:
        d_model: D, the width of each modality.
        num_latents: M.
        k: how many latents describe a token.
        num_modalities: how many there are.
        mask_probability: in [0, 1).
        group_weight: of the penalty.
        shared_support: whether a pair's tokens have the same latents.
        mask_seed: of the masks, which are functions of it, of the number of the pair in the run, and of the
            latent.
        device, dtype: of the parameters.
        generator: source of the initial atoms, on the parameters' device; default: PyTorch's global one.
        options: of :class:`TopKSAE`.

    Attributes:
        coders: one for each modality, a :class:`TopKSAE` with latents of its own for the same indices.
        pairs_seen: scalar int64 buffer; :meth:`count_firings_` counts.

    Raises:
        TypeError, ValueError: a size is not a positive integer, or an option is out of its range.

    Example:
        >>> import torch
        >>> from fastsparse.nn import GroupSparseSAE
        >>> model = GroupSparseSAE(d_model=8, num_latents=32, k=4, num_modalities=2)
        >>> x = torch.randn(16, 2, 8)
        >>> model(x).shape, [code.indices.shape for code in model.encode(x)]
        (torch.Size([16, 2, 8]), [torch.Size([16, 4]), torch.Size([16, 4])])
        >>> model.loss(x).loss.backward()

    Source: Kaushik et al. 2026, arXiv 2601.20028; shared supports: SPARC, Nasiri-Sarvi et al. 2025,
    arXiv 2507.06265.
    """

    pairs_seen: Tensor

    def __init__(
        self,
        d_model: int,
        num_latents: int,
        k: int,
        *,
        num_modalities: int = 2,
        mask_probability: float = 0.2,
        group_weight: float = 0.05,
        shared_support: bool = False,
        mask_seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        name = type(self).__name__
        d_model = check_count(name, "d_model", d_model, 1)
        num_modalities = check_count(name, "num_modalities", num_modalities, 1)
        check_flag(name, "shared_support", shared_support)
        for option in options:
            if option in _NOT_HERE:
                raise TypeError(f"{name} has no option {option}, got {options[option]!r}")
        options |= {"device": device, "dtype": dtype, "generator": generator, "centred": True}
        coders = [
            made_coder(name, "topk", (d_model,) * 2, num_latents, k, **options) for _ in range(num_modalities)
        ]
        super().__init__("topk", coders)
        if not 0 <= self._weight("mask_probability", mask_probability) < 1:
            raise ValueError(f"{name}: mask_probability must be below 1, got {mask_probability}")
        self.d_model, self.num_modalities = d_model, num_modalities
        self.mask_probability = float(mask_probability)
        self.group_weight = self._weight("group_weight", group_weight)
        self.shared_support = shared_support
        self.mask_seed = whole_number(name, "mask_seed", mask_seed)
        self.register_buffer("pairs_seen", torch.zeros((), dtype=torch.int64, device=device))

    @classmethod
    def sizes_of(cls, inputs: tuple[int, ...], targets: tuple[int, ...] | None) -> dict[str, int]:
        """``d_model`` and ``num_modalities``, for tokens (number, D): see :meth:`Model.sizes_of`."""
        if targets is not None or len(inputs) != 2:
            raise ValueError(
                f"{cls.__name__} reconstructs inputs (N, num_modalities, D), without targets: got rows of "
                f"shape {inputs}, targets {targets}"
            )
        return {"d_model": inputs[1], "num_modalities": inputs[0]}

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new atoms, and start again from them."""
        super().reset_parameters(generator)
        self.pairs_seen.zero_()

    def init_decoder_bias_(self, x: Tensor, *, method: str = "geometric_median") -> None:
        """Set ``b_dec`` to the centres of a sample: :meth:`SparseAutoencoder.init_decoder_bias_`."""
        for coder, part in self._modalities("init_decoder_bias_", x):
            coder.init_decoder_bias_(part, method=method)

    def encode(self, x: Tensor) -> tuple[TopK, ...]:
        """Describe tokens (..., modalities, D) by their k strongest latents, none of them masked.

        Returns:
            For each modality a :class:`fastsparse.TopK` ``(values, indices)``, both (..., k).
        """
        return tuple(
            self._encode([coder._center(part) for coder, part in self._modalities("encode", x)], None)
        )

    def decode(self, code: Sequence[TopK]) -> Tensor:
        """Reconstruct tokens (..., modalities, D) from what :meth:`encode` returned."""
        return torch.stack([c.decode(part) for c, part in zip(self.coders, code, strict=True)], dim=-2)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct tokens (..., modalities, D) from their codes."""
        return self.decode(self.encode(x))

    def loss(self, x: Tensor) -> SAELoss:
        """As :meth:`SparseAutoencoder.loss`, of tokens (..., modalities, D).

        Its code has a part for each modality. fvu is that of all together, aux their sum, l0 and density
        their means, and num_dead counts the dead latents of all.
        """
        dead = [coder.dead for coder in self.coders]
        num_dead = [int(each.sum()) for each in dead]  # first, as in SparseAutoencoder.loss
        parts = [(coder, part.reshape(-1, self.d_model)) for coder, part in self._modalities("loss", x)]
        if x.numel() == 0:
            raise ValueError(f"{self._name}.loss: x must hold at least one token, got shape {tuple(x.shape)}")
        centered = [coder._center(part) for coder, part in parts]
        pairs = self.pairs_seen + torch.arange(len(centered[0]), device=x.device) if self.training else None
        codes = self._encode(centered, pairs)
        spread = spread_of(torch.cat([part for _, part in parts], dim=1))
        found = [
            coder._scored(near, Described(code, coder._decoded(code)), part, spread, *about)
            for (coder, part), near, code, *about in zip(parts, centered, codes, dead, num_dead, strict=True)
        ]
        losses, fvus, auxes, _, l0s, densities, _, codes = zip(*found, strict=True)
        penalty = self.group_weight * _group_norms(codes).sum(dim=1).mean()
        number = self.num_modalities
        return SAELoss(
            sum(losses) + penalty, sum(fvus), sum(auxes), penalty.detach(), sum(l0s) / number,
            sum(densities) / number, sum(num_dead), codes,
        )  # fmt: skip

    def count_firings_(self, code: Sequence[TopK], *, group: Group = None) -> None:
        """As :meth:`SparseAutoencoder.count_firings_`, of what :meth:`loss` returned, and count the pairs."""
        for coder, part in zip(self.coders, code, strict=True):
            coder.count_firings_(part, group=group)
        self.pairs_seen += code[0].indices.shape[:-1].numel()

    def _encode(self, centered: Sequence[Tensor], pairs: Tensor | None) -> list[TopK]:
        """Codes of tokens (N, D) each, of pairs of these numbers, or without a mask."""
        if not self.shared_support:
            return [
                self._topk(x, coder.W_enc, coder.b_enc, pairs)
                for x, coder in zip(centered, self.coders, strict=True)
            ]
        beside = [torch.cat(parts, dim=-1) for parts in (centered, [coder.W_enc for coder in self.coders])]
        with torch.no_grad():
            sums, indices = self._topk(*beside, sum(coder.b_enc for coder in self.coders), pairs)
        ones = sums.new_ones(*indices.shape[:-1], 1)  # sddmm's gradient has a fixed order, an index's has not
        codes = []
        for x, coder in zip(centered, self.coders, strict=True):
            scores = sddmm(x, coder.W_enc, indices) + sddmm(ones, coder.b_enc.unsqueeze(1), indices)
            codes.append(TopK(torch.where(sums > 0, scores.relu(), 0), indices))
        return codes

    def _topk(self, x: Tensor, weight: Tensor, bias: Tensor, pairs: Tensor | None) -> TopK:
        if pairs is None or self.mask_probability == 0:
            return topk_encode(x, weight, bias, k=self.k)
        return masked_topk(
            lambda count: topk_encode(x, weight, bias, k=count),
            lambda indices: kept(pairs.unsqueeze(1), indices, self.mask_probability, self.mask_seed),
            self.k,
            self.num_latents,
            1 - self.mask_probability,
        )

    def _modalities(self, method: str, x: Tensor) -> list[tuple[Any, Tensor]]:
        self._check_stacks(method, "x", x, "num_modalities", self.num_modalities, self.d_model)
        return list(zip(self.coders, x.unbind(dim=-2), strict=True))

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, num_modalities={self.num_modalities}, "
            f"mask_probability={self.mask_probability:g}, group_weight={self.group_weight:g}, "
            f"shared_support={self.shared_support}"
        )


def _group_norms(codes: Sequence[TopK]) -> Tensor:
    """(N, modalities k): the norms over the modalities of the latents' values, and 0 in other places.

    A latent's entries are neighbours once all are in order; its norm is where the first of them is.
    """
    indices, order = torch.cat([code.indices for code in codes], dim=1).sort(dim=1, stable=True)
    squares = torch.cat([code.values for code in codes], dim=1).gather(1, order)
    squares = squares.to(torch.promote_types(squares.dtype, torch.float32)).square()
    total = squares
    for behind in range(1, len(codes)):
        same = indices[:, behind:] == indices[:, :-behind]
        total = total + F.pad(torch.where(same, squares[:, behind:], 0), (0, behind))
    first = torch.ones_like(indices, dtype=torch.bool)
    first[:, 1:] = indices.diff(dim=1) != 0
    positive = first & (total > 0)  # a root has no derivative at 0
    return torch.where(positive, torch.where(positive, total, 1).sqrt(), 0)
