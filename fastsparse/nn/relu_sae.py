"""The sparse autoencoder of rectified latents whose sum, or sum of powers, is penalised."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsparse._validation import check_positive, check_rows
from fastsparse.functional._tensors import flat
from fastsparse.nn._elementwise import Elementwise
from fastsparse.nn._stripes import Activated


class ReLUSAE(Elementwise):
    """A sparse autoencoder that describes every token by its positive latents.

    ``f = relu(W_enc (x - b_dec) + b_enc)``, reconstruction ``f W_dec + b_dec``. The penalty is ``l1`` times
    the mean over tokens of the sum of ``(f * norm of the atom)^p``: atoms needn't be kept at norm 1, as
    longer ones don't make it less.

    It is added to the fvu. Papers add theirs to the squared error: divide their weights by the mean variance
    of a token, ``(x - x.mean(dim=0)).square().sum(dim=1).mean()``.

    For a training step see :class:`SparseAutoencoder`.

    Args:
        d_model: D, the width of the activations.
        num_latents: M.
        l1: weight of the penalty.
        p: above 0; below 1 it is closer to how many latents there are. :meth:`anneal_p_` changes it.
        unit_norm: whether the atoms of a linear decoder are kept at norm 1.
        decoder: ``"linear"``, or ``"polynomial"``: rows of ``W_dec`` (M, R1) add up to coordinates, and the
            reconstruction is a cubic polynomial of these (PolySAE).
        ranks: of a polynomial decoder (R1, R2, R3), D >= R1 >= R2 >= R3: how many coordinates there are, and
            how many of them, from the first on, have squares, and cubes.
        prefixes: ascending, below M: numbers of latents that, from the first on, are to reconstruct as well
            as they can on their own, as all do (Matryoshka).
        prefix_weights: of the losses of the prefixes, and of all latents, last; default: 1 each.
        aux_k: how many dead latents the auxiliary loss uses for a token; 0 turns it off.
        aux_weight: its weight in the loss.
        dead_after: a latent is dead when it has not been positive for this many tokens.
        dense: how the loss is computed: ``"sparse"`` by the positive scores, ``"stripes"`` by all of them,
            without ever keeping all, or ``"auto"``, by how many those were.
        device, dtype: of the parameters.
        generator: source of the initial atoms, on the parameters' device; default: PyTorch's global one.

    Attributes:
        W_enc: (M, D); b_enc: (M,); W_dec: (M, D), row m is atom m; b_dec: (D,).
        l1, p: scalar fp32 buffers.
        tokens_since_fired: (M,) int64 buffer, density: scalar fp32 buffer, the share of the pre-activations
            that were entries of the last step; :meth:`count_firings_` counts.

    Raises:
        TypeError, ValueError: a size is not a positive integer, or an option is out of its range.

    Example:
        >>> import torch
        >>> from fastsparse.nn import ReLUSAE
        >>> sae = ReLUSAE(d_model=8, num_latents=32, l1=0.01)
        >>> x = torch.randn(16, 8)
        >>> sae.loss(x).loss.backward()
        >>> sae.anneal_p_(0.9, x)

    Source: Anthropic's circuits update of April 2024; p: Karvonen et al. 2024, "Measuring Progress in
    Dictionary Learning for Language Model Interpretability with Board Game Models", arXiv 2408.00113.
    """

    l1: Tensor
    p: Tensor
    _wide = (*Elementwise._wide, "l1", "p")

    def __init__(
        self,
        d_model: int,
        num_latents: int,
        *,
        l1: float,
        p: float = 1.0,
        unit_norm: bool = False,
        decoder: str = "linear",
        ranks: Sequence[int] = (),
        prefixes: Sequence[int] = (),
        prefix_weights: Sequence[float] | None = None,
        aux_k: int = 0,
        aux_weight: float = 1 / 32,
        dead_after: int = 10_000_000,
        dense: str = "auto",
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
            dense=dense,
            device=device,
            dtype=dtype,
        )
        check_positive(self._name, "p", p)
        self._initial = self._weight("l1", l1), float(p)
        for name, first in zip(("l1", "p"), self._initial, strict=True):  # annealed, so part of the state
            self.register_buffer(name, torch.tensor(first, dtype=torch.float32, device=device))
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new atoms, and start again from them, and from the first penalty."""
        super().reset_parameters(generator)
        for buffer, first in zip((self.l1, self.p), self._initial, strict=True):
            buffer.fill_(first)

    def options(self) -> dict[str, Any]:
        """As :meth:`SparseAutoencoder.options`; ``l1`` and ``p`` are the initial ones."""
        return super().options() | dict(zip(("l1", "p"), self._initial, strict=True))

    def _terms(self) -> Sequence[Tensor]:
        return (self._norms(),)

    def _activate(self, scores: Tensor, norms: Tensor) -> Activated:
        values = F.relu(scores)
        return Activated(values, (self._powers(values, norms),))

    def _powers(self, values: Tensor, norms: Tensor) -> Tensor:
        weighed = values * norms
        nothing = weighed == 0  # whose power has an infinite slope, for p below 1
        return weighed.masked_fill(nothing, 1).pow(self.p).masked_fill(nothing, 0)

    def _penalty(self, x: Tensor, centered: Tensor, costs: Sequence[Tensor], gated: Tensor | None) -> Tensor:
        return self.l1 * costs[0].mean()

    @torch.no_grad()
    def anneal_p_(self, p: float, x: Tensor) -> None:
        """Change p, and l1 with it, so that the penalty of these tokens stays what it was.

        Args:
            p: above 0.
            x: (..., D), tokens of the last few batches, the same ones in all processes that train together;
                where no latent is positive in any, l1 stays.

        Raises:
            TypeError, ValueError: p is not above 0, or x has the wrong dtype or shape.

        Source: Karvonen et al. 2024, arXiv 2408.00113, section 4.
        """
        method = f"{self._name}.anneal_p_"
        check_positive(method, "p", p)
        check_rows(method, "x", x, self.d_model)
        x = flat(x) if x.dim() > 1 else x.unsqueeze(0)
        before = self._describe(x, self._center(x)).penalty
        self.p.fill_(p)
        after = self._describe(x, self._center(x)).penalty
        self.l1.mul_(torch.where(after > 0, before / after, 1))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, l1={float(self.l1):g}, p={float(self.p):g}"
