"""The TopK sparse autoencoder with unit-norm atoms and an auxiliary loss that revives dead latents."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsparse._options import position_of
from fastsparse._validation import check_count
from fastsparse.functional import TopK, topk_encode
from fastsparse.nn._levels import by_budget
from fastsparse.nn._threshold import Thresholded
from fastsparse.nn.sparse_autoencoder import Code, Described, Firings


class TopKSAE(Thresholded):
    """A sparse autoencoder that describes every token by its k strongest latents.

    ``z = relu(topk(W_enc (x - b_dec) + b_enc))``, reconstruction ``z W_dec + b_dec``. The rows of ``W_dec``
    (the atoms) start with norm 1, ``W_enc`` as a copy of ``W_dec``, both biases as 0.

    For a training step see :class:`SparseAutoencoder`.

    Args:
        d_model: D, the width of the activations.
        num_latents: M.
        k: how many latents describe a token, 1 <= k <= M / groups: of each group.
        activation: ``"relu"``, or ``"abs"``: the latents of the largest absolute scores, with their signs.
        groups: how many equal groups the latents are in, one after the other (GroupMax: ``groups=k, k=1``).
        budgets: ascending; numbers of latents a token that are to reconstruct as well as they can, the
            strongest first (Multi-TopK: ``(k, 4 * k)``; HierarchicalTopK: any few). One of them is k; the
            loss encodes by the largest. Not beside groups or prefixes.
        budget_weights: of their losses; default: 1 each.
        unit_norm: whether the atoms of a linear decoder are kept at norm 1.
        decoder: ``"linear"``, or ``"polynomial"``: rows of ``W_dec`` (M, R1) add up to coordinates, and the
            reconstruction is a cubic polynomial of these (PolySAE).
        ranks: of a polynomial decoder (R1, R2, R3), D >= R1 >= R2 >= R3: how many coordinates there are, and
            how many of them, from the first on, have squares, and cubes.
        prefixes: ascending, below M: numbers of latents that, from the first on, are to reconstruct as well
            as they can on their own, as all do (Matryoshka).
        prefix_weights: of the losses of the prefixes, and of all latents, last; default: 1 each.
        aux_k: how many dead latents the auxiliary loss uses for a token; 0 turns it off. Default: the power
            of two nearest to D / 2.
        aux_weight: its weight in the loss.
        dead_after: a latent is dead when it has not been positive for this many tokens.
        threshold_decay: of the moving average of the least positive value of a token, which
            :meth:`export_threshold` makes a threshold.
        device, dtype: of the parameters.
        generator: source of the initial atoms, on the parameters' device; default: PyTorch's global one.

    Attributes:
        W_enc: (M, D); b_enc: (M,); W_dec: (M, D), row m is atom m; b_dec: (D,).
        tokens_since_fired: (M,) int64 buffer; :meth:`count_firings_` counts.

    Raises:
        TypeError, ValueError: a size is not a positive integer, k is above M / groups, or an option is out of
            its range.

    Example:
        >>> import torch
        >>> from fastsparse.nn import TopKSAE
        >>> sae = TopKSAE(d_model=8, num_latents=32, k=4)
        >>> x = torch.randn(16, 8)
        >>> sae(x).shape, sae.encode(x).indices.shape
        (torch.Size([16, 8]), torch.Size([16, 4]))
        >>> sae.loss(x).loss.backward()

    Source: Gao et al. 2024, arXiv 2406.04093, section 2.3 and appendix A.
    """

    def __init__(
        self,
        d_model: int,
        num_latents: int,
        k: int,
        *,
        activation: str = "relu",
        groups: int = 1,
        budgets: Sequence[int] = (),
        budget_weights: Sequence[float] | None = None,
        unit_norm: bool = True,
        decoder: str = "linear",
        ranks: Sequence[int] = (),
        prefixes: Sequence[int] = (),
        prefix_weights: Sequence[float] | None = None,
        aux_k: int | None = None,
        aux_weight: float = 1 / 32,
        dead_after: int = 10_000_000,
        threshold_decay: float = 0.999,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            d_model,
            num_latents,
            unit_norm=unit_norm,
            decoder=decoder,
            ranks=ranks,
            prefixes=prefixes,
            prefix_weights=prefix_weights,
            aux_k=aux_k,
            aux_weight=aux_weight,
            dead_after=dead_after,
            threshold_decay=threshold_decay,
            device=device,
            dtype=dtype,
        )
        self.k = check_count(self._name, "k", k, 1)
        position_of(self._name, "activation", activation, ("relu", "abs"))
        self.activation = self._activation = activation
        self.groups = check_count(self._name, "groups", groups, 1)
        if self.num_latents % self.groups:
            raise ValueError(
                f"{self._name}: groups must divide num_latents ({self.num_latents}), got groups={groups}"
            )
        most = self.num_latents // self.groups
        if self.k > most:
            of_all = "num_latents" if self.groups == 1 else "num_latents / groups"
            raise ValueError(f"{self._name}: k must be at most {of_all} ({most}), got k={self.k}")
        self.budgets = self._ascending("budgets", budgets, self.num_latents)
        self.budget_weights = self._weights("budget_weights", budget_weights, len(self.budgets))
        if self.budgets and (self.k not in self.budgets or self.prefixes or self.groups > 1):
            raise ValueError(
                f"{self._name}: budgets must hold k ({self.k}), and have neither prefixes nor groups beside "
                f"them, got budgets={self.budgets}, prefixes={self.prefixes}, groups={self.groups}"
            )
        self.reset_parameters(generator)

    def encode(self, x: Tensor) -> TopK:
        """Describe tokens by their k strongest latents.

        Args:
            x: (..., D), the dtype of the parameters, or one that it covers.

        Returns:
            :class:`fastsparse.TopK` ``(values, indices)``, both (..., k), largest first; of groups
            (..., groups k), group by group. Values are at least 0 but for ``activation="abs"``.
        """
        return self._encode(self._center(x), self.k)

    def _encode(self, centered: Tensor, k: int) -> TopK:
        return topk_encode(
            centered, self.W_enc, self.b_enc, k=k, activation=self.activation, groups=self.groups
        )

    def _describe(self, x: Tensor, centered: Tensor) -> Described:
        if not self.budgets:
            code = self._encode(centered, self.k)
            return Described(code, self._decoded(code))
        code = self._encode(centered, self.budgets[-1])
        levels = self._cut(by_budget, code, self.budgets)
        chosen = self.budgets.index(self.k)
        kept = TopK(code.values[:, : self.k], code.indices[:, : self.k])
        return Described(kept, levels, main=chosen)

    def _level_weights(self) -> Sequence[float]:
        return self.budget_weights if self.budgets else self.prefix_weights

    def _least_positive(self, code: Code | Firings) -> Tensor:
        """Of every token's values; tokens without a positive one say nothing."""
        values = code.values.detach().float().abs()
        least = torch.where(values > 0, values, torch.inf).amin(dim=-1).flatten()
        there = least < torch.inf
        return torch.stack([torch.where(there, least, 0).sum(), there.sum(dtype=torch.float32)])

    def extra_repr(self) -> str:
        told = f"{super().extra_repr()}, k={self.k}, activation={self.activation!r}"
        told += f", groups={self.groups}" if self.groups > 1 else ""
        return told + (f", budgets={self.budgets}" if self.budgets else "")
