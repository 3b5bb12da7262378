"""The JumpReLU sparse autoencoder: latents above thresholds of their own, which are trained."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsparse._options import position_of
from fastsparse._validation import check_flag, check_positive, check_tolerance
from fastsparse.functional import jump
from fastsparse.nn._elementwise import Elementwise
from fastsparse.nn._linear_encoder import LinearEncoder
from fastsparse.nn._stripes import Activated


class JumpReLUSAE(Elementwise):
    """A sparse autoencoder that describes every token by its latents above thresholds, as they are.

    Of a score ``z = W_enc (x - b_dec) + b_enc`` the value is ``z`` where it is above the latent's threshold,
    else 0. Thresholds learn by straight-through estimates from scores near them (:func:`fastsparse.jump`).

    The penalty counts latents, by one of these, each a mean over tokens with L0 active latents::

        "l0":         penalty_weight * L0
        "quadratic":  penalty_weight * 2 / target_l0 * (L0 - target_l0)^2
        "tanh":       penalty_weight * sum over latents of tanh(tanh_scale * value * norm of the atom)

    It is added to the fvu. Papers add theirs to the squared error: divide their weights by the mean variance
    of a token, ``(x - x.mean(dim=0)).square().sum(dim=1).mean()``.

    For a training step see :class:`SparseAutoencoder`.

    Args:
        d_model: D, the width of the activations.
        num_latents: M.
        bandwidth: how far from each other, half of it on each side, scores and thresholds are that learn, in
            the unit of scores.
        threshold: what all thresholds are at first.
        penalty: ``"l0"``, ``"quadratic"`` or ``"tanh"``.
        penalty_weight: its weight.
        target_l0: how many active latents ``"quadratic"`` asks of a token.
        tanh_scale: of ``"tanh"``.
        pre_act_weight: of a loss that pulls scores up to their thresholds, so that no latent dies: the mean
            over tokens of the sum of ``norm of the atom * relu(threshold - score)``.
        ste_to_input: whether scores get the estimates as well as thresholds.
        threshold_form: ``"log"`` trains the logarithm of a threshold, ``"linear"`` itself, which
            :meth:`after_step_` then keeps at 0 or more.
        learn_threshold: whether thresholds are trained. Those that are not stay in fp32 (fp64 of a
            model made in fp64), and have no form.
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
        dead_after: a latent is dead when it has not been active for this many tokens.
        dense: how the loss is computed: ``"sparse"`` by the scores that are active or in the band,
            ``"stripes"`` by all of them, without ever keeping all, or ``"auto"``, by how many those were.
            With a bandwidth as wide as scores are, nearly all.
        device, dtype: of the parameters.
        generator: source of the initial atoms, on the parameters' device; default: PyTorch's global one.

    Attributes:
        W_enc: (M, D); b_enc: (M,); W_dec: (M, D), row m is atom m; b_dec: (D,).
        raw_threshold: (M,), the parameter in its form; a buffer where thresholds are not trained.
        tokens_since_fired: (M,) int64 buffer, density: scalar fp32 buffer, the share of the pre-activations
            that were entries of the last step; :meth:`count_firings_` counts.

    Raises:
        TypeError, ValueError: a size is not a positive integer, or an option is out of its range.

    Example:
        >>> import torch
        >>> from fastsparse.nn import JumpReLUSAE
        >>> sae = JumpReLUSAE(d_model=8, num_latents=32, penalty_weight=0.01)
        >>> x = torch.randn(16, 8)
        >>> sae(x).shape, sae.encode(x).offsets.shape
        (torch.Size([16, 8]), torch.Size([17]))
        >>> sae.loss(x).loss.backward()

    Source: Rajamanoharan et al. 2024, arXiv 2407.14435; ``"tanh"``, ``pre_act_weight`` and ``ste_to_input``:
    Anthropic's circuits update of January 2025.
    """

    def __init__(
        self,
        d_model: int,
        num_latents: int,
        *,
        bandwidth: float = 0.001,
        threshold: float = 0.001,
        penalty: str = "l0",
        penalty_weight: float = 0.001,
        target_l0: float | None = None,
        tanh_scale: float = 4.0,
        pre_act_weight: float = 0.0,
        ste_to_input: bool = False,
        threshold_form: str = "log",
        learn_threshold: bool = True,
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
        name = self._name
        check_positive(name, "bandwidth", bandwidth)
        position_of(name, "penalty", penalty, ("l0", "quadratic", "tanh"))
        if penalty == "quadratic" or target_l0 is not None:
            check_positive(name, "target_l0", target_l0)
        check_positive(name, "tanh_scale", tanh_scale)
        check_flag(name, "ste_to_input", ste_to_input)
        check_flag(name, "learn_threshold", learn_threshold)
        position_of(name, "threshold_form", threshold_form, ("log", "linear"))
        self.threshold_form = threshold_form if learn_threshold else "linear"
        (check_positive if self.threshold_form == "log" else check_tolerance)(name, "threshold", threshold)
        self.bandwidth, self.initial_threshold = bandwidth, threshold
        self.penalty, self.penalty_weight = penalty, self._weight("penalty_weight", penalty_weight)
        self.target_l0, self.tanh_scale = target_l0, tanh_scale
        self.pre_act_weight = self._weight("pre_act_weight", pre_act_weight)
        self.ste_to_input, self.learn_threshold = ste_to_input, learn_threshold
        if learn_threshold:
            self.raw_threshold = nn.Parameter(torch.empty(self.num_latents, device=device, dtype=dtype))
        else:
            self.register_buffer("raw_threshold", torch.empty_like(self._widened(self.b_enc.detach())))
            self._wide = (*self._wide, "raw_threshold")
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new atoms, and start again from them, and from the initial threshold."""
        super().reset_parameters(generator)
        first = self.initial_threshold
        self.raw_threshold.fill_(math.log(first) if self.threshold_form == "log" else first)

    def options(self) -> dict[str, Any]:
        """As :meth:`SparseAutoencoder.options`; ``threshold`` is the initial one."""
        return super().options() | {"threshold": self.initial_threshold}

    @property
    def threshold(self) -> Tensor:
        """(M,) in fp32 (fp64 of fp64 parameters): what the scores of active latents are above."""
        raw = self.raw_threshold.to(self._widened(self.b_enc).dtype)
        return raw.exp() if self.threshold_form == "log" else raw

    def _threshold(self) -> Tensor:
        return self.threshold.detach()

    def _bounds(self) -> Tensor:
        return self._threshold() - self.bandwidth / 2

    def _terms(self) -> Sequence[Tensor]:
        return (self.threshold, self._norms()) if self._needs_norms else (self.threshold,)

    @property
    def _needs_norms(self) -> bool:
        return self.penalty == "tanh" or self.pre_act_weight > 0

    def _activate(self, scores: Tensor, threshold: Tensor, norms: Tensor | None = None) -> Activated:
        values, gate = jump(scores, threshold, self.bandwidth, ste_to_input=self.ste_to_input)
        cost = torch.tanh(self.tanh_scale * values * norms) if self.penalty == "tanh" else gate
        if self.pre_act_weight == 0:
            return Activated(values, (cost,))
        return Activated(values, (cost, F.relu(scores - threshold) * norms))

    def _penalty(self, x: Tensor, centered: Tensor, costs: Sequence[Tensor], gated: Tensor | None) -> Tensor:
        cost = costs[0]
        if self.penalty == "quadratic":
            cost = 2 / self.target_l0 * (cost - self.target_l0).square()
        penalty = self.penalty_weight * cost.mean()
        if self.pre_act_weight > 0:
            penalty = penalty + self.pre_act_weight * (costs[1].mean() + self._mean_below(centered))
        return penalty

    def _mean_below(self, centered: Tensor) -> Tensor:
        """How far the scores of a token are below their thresholds, those above counting against it.

        Summed up with the norms of the atoms as weights. It is linear in the scores, so that no score is
        needed: with what those above make up it is the sum of the ones below.
        """
        norms = self._norms()
        with torch.autocast(centered.device.type, enabled=False):
            mean = self._widened(centered).mean(dim=0)
            scores = torch.mv(self._widened(self.W_enc), mean) + self.b_enc
            return (norms * (self.threshold - scores)).sum()

    @torch.no_grad()
    def after_step_(self) -> None:
        """What a training step does after the optimiser's step."""
        super().after_step_()
        if self.learn_threshold and self.threshold_form == "linear":
            self._reshard()
            self.raw_threshold.clamp_(min=0)

    def extra_repr(self) -> str:
        told = f"{super().extra_repr()}, bandwidth={self.bandwidth:g}, penalty={self.penalty!r}"
        return f"{told}, penalty_weight={self.penalty_weight:g}, learn_threshold={self.learn_threshold}"


@torch.no_grad()
def with_thresholds(sae: LinearEncoder, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> JumpReLUSAE:
    """The autoencoder of these scores and thresholds, which are not trained, and another one's decoder."""
    options: dict[str, Any] = {"unit_norm": sae.unit_norm, "prefixes": sae.prefixes}
    options |= {"decoder": sae.decoder, "ranks": sae.ranks}
    options |= {"prefix_weights": sae.prefix_weights, "dead_after": sae.dead_after}
    options |= {"device": sae.W_dec.device, "dtype": sae.W_dec.dtype}
    options["generator"] = torch.Generator(sae.W_dec.device)  # of atoms that are replaced: no global state
    made = JumpReLUSAE(sae.d_model, sae.num_latents, learn_threshold=False, **options)
    made.W_enc.copy_(W_enc)
    made.b_enc.copy_(b_enc)
    made.W_dec.copy_(sae.W_dec)
    made.b_dec.copy_(sae.b_dec)
    if sae.polynomial is not None:
        made.polynomial.load_state_dict(sae.polynomial.state_dict())
    made.raw_threshold.copy_(threshold)
    made.tokens_since_fired.copy_(sae.tokens_since_fired)
    return made
