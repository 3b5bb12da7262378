"""The gated sparse autoencoder: which latents are active is one question, how much so another."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsparse.functional import Ragged
from fastsparse.functional._tensors import flat
from fastsparse.nn._elementwise import Elementwise
from fastsparse.nn._stripes import Activated
from fastsparse.nn.fvu import spread_of, unexplained
from fastsparse.nn.jump_relu_sae import JumpReLUSAE, with_thresholds


class GatedSAE(Elementwise):
    """A sparse autoencoder that gates latents by one affine function of their scores and weighs by another.

    With ``u = W_enc (x - b_dec)`` the value of a latent is ``relu(exp(r_mag) u + b_mag)`` where its gate
    ``u + b_enc`` is positive, else 0. The penalty is ``l1`` times the mean over tokens of the sum of the
    rectified gates, plus the fvu of what they reconstruct by themselves, by a decoder that is held fixed.
    Magnitudes are not penalised, and so don't shrink.

    The penalty is added to the fvu. Papers add theirs to the squared error: divide their weights by the mean
    variance of a token, ``(x - x.mean(dim=0)).square().sum(dim=1).mean()``.

    For a training step see :class:`SparseAutoencoder`.

    Args:
        d_model: D, the width of the activations.
        num_latents: M.
        l1: weight of the gates' sum.
        unit_norm: whether the atoms of a linear decoder are kept at norm 1.
        decoder: ``"linear"``, or ``"polynomial"``: rows of ``W_dec`` (M, R1) add up to coordinates, and the
            reconstruction is a cubic polynomial of these (PolySAE).
        ranks: of a polynomial decoder (R1, R2, R3), D >= R1 >= R2 >= R3: how many coordinates there are, and
            how many of them, from the first on, have squares, and cubes.
        prefixes: ascending, below M: numbers of latents that, from the first on, are to reconstruct as well
            as they can on their own, as all do (Matryoshka); by their values, gates reconstruct all together.
        prefix_weights: of the losses of the prefixes, and of all latents, last; default: 1 each.
        aux_k: how many dead latents the auxiliary loss uses for a token; 0 turns it off.
        aux_weight: its weight in the loss.
        dead_after: a latent is dead when it has not been positive for this many tokens.
        dense: how the loss is computed: ``"sparse"`` by the scores whose gates are positive, ``"stripes"`` by
            all of them, without ever keeping all, or ``"auto"``, by how many those were.
        device, dtype: of the parameters.
        generator: source of the initial atoms, on the parameters' device; default: PyTorch's global one.

    Attributes:
        W_enc: (M, D); b_enc: (M,), of the gates; W_dec: (M, D), row m is atom m; b_dec: (D,).
        r_mag: (M,); b_mag: (M,).
        tokens_since_fired: (M,) int64 buffer, density: scalar fp32 buffer, the share of the pre-activations
            that were entries of the last step; :meth:`count_firings_` counts.

    Raises:
        TypeError, ValueError: a size is not a positive integer, or an option is out of its range.

    Example:
        >>> import torch
        >>> from fastsparse.nn import GatedSAE
        >>> sae = GatedSAE(d_model=8, num_latents=32, l1=0.01)
        >>> x = torch.randn(16, 8)
        >>> sae.loss(x).loss.backward()
        >>> torch.allclose(sae(x), sae.export_threshold()(x), atol=1e-5)
        True

    Source: Rajamanoharan et al. 2024, "Improving Dictionary Learning with Gated Sparse Autoencoders", arXiv
    2404.16014, section 3; its appendix on JumpReLU for :meth:`export_threshold`.
    """

    def __init__(
        self,
        d_model: int,
        num_latents: int,
        *,
        l1: float,
        unit_norm: bool = True,
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
        self.l1 = self._weight("l1", l1)
        self.r_mag = nn.Parameter(torch.zeros_like(self.b_enc))
        self.b_mag = nn.Parameter(torch.zeros_like(self.b_enc))
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new atoms, and start again from them."""
        super().reset_parameters(generator)
        self.r_mag.zero_()
        self.b_mag.zero_()

    def encode(self, x: Tensor) -> Ragged:
        """Describe tokens by the latents whose gates are positive.

        Args:
            x: (..., D), the dtype of the parameters, or one that it covers.

        Returns:
            :class:`fastsparse.Ragged` ``(values, indices, offsets)``, whose rows are the tokens.

        Raises:
            RuntimeError: there are more entries than there is memory for, as of a model that has diverged.
        """
        centered = flat(self._center(x))
        scores, found = self._entries(centered)
        return scores._replace(values=found.values.to(centered.dtype))

    def _terms(self) -> Sequence[Tensor]:
        return self._widened(self.b_enc), self._widened(self.r_mag), self._widened(self.b_mag)

    def _activate(self, scores: Tensor, b_enc: Tensor, r_mag: Tensor, b_mag: Tensor) -> Activated:
        values = F.relu(r_mag.exp() * (scores - b_enc) + b_mag).masked_fill(scores <= 0, 0)
        gates = F.relu(scores)
        return Activated(values, (gates,), gates)

    def _penalty(self, x: Tensor, centered: Tensor, costs: Sequence[Tensor], gated: Tensor | None) -> Tensor:
        return self.l1 * costs[0].mean() + unexplained(gated, x, spread_of(x))

    @torch.no_grad()
    def export_threshold(self) -> JumpReLUSAE:
        """The same autoencoder with a threshold for each latent.

        A gate is positive where ``exp(r_mag) u + b_mag`` is above ``b_mag - exp(r_mag) b_enc``.

        Returns:
            A :class:`JumpReLUSAE` with copies of the parameters, whose thresholds are not trained.
        """
        b_enc, r_mag, b_mag = self._terms()
        scale = r_mag.exp()
        threshold = (b_mag - scale * b_enc).clamp_min(0)
        return with_thresholds(self, scale.unsqueeze(1) * self.W_enc, b_mag, threshold)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, l1={self.l1:g}"
