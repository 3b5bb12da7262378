"""What every sparse autoencoder here has: atoms, a centre, levels, and dead latents to be revived."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn

from fastsparse._options import position_of
from fastsparse._validation import check_count, check_flag, check_range, check_rows, named
from fastsparse.functional import BatchTopK, Pursuit, Ragged, TopK, polynomial_decode, sparse_decode
from fastsparse.functional._tensors import flat
from fastsparse.nn._atoms import all_rows, normalize_, own_rows, remove_parallel_, sum_of_rows_
from fastsparse.nn._groups import Group, counting_group
from fastsparse.nn._levels import by_prefix
from fastsparse.nn._median import geometric_median
from fastsparse.nn._model import Model
from fastsparse.nn._polynomial_decoder import Polynomial, checked_ranks, orthonormal, retract_
from fastsparse.nn.fvu import spread_of, unexplained


class Firings(NamedTuple):
    """How often each latent had a nonzero value, where a step kept no code.

    Attributes:
        counts: (M,) int64.
        num_tokens: of how many tokens.
        num_entries: scalar int64, how many pre-activations a code would have had as entries.
    """

    counts: Tensor
    num_tokens: int
    num_entries: Tensor


Code = TopK | Ragged | BatchTopK | Pursuit


class SAELoss(NamedTuple):
    """What :meth:`SparseAutoencoder.loss` returns.

    Attributes:
        loss: scalar to minimise: the weighted sum of the levels' fvu (one, of weight 1, where there are no
            prefixes or budgets), and ``penalty``, and ``aux_weight * aux``.
        fvu: scalar, the fraction of the batch's variance that the reconstruction leaves unexplained.
        aux: scalar, the same of the residual as dead latents reconstruct it; 0 with nothing to revive.
        penalty: scalar, what sparsity costs, its weight included; 0 for encoders that choose how many.
        l0: scalar, the mean number of nonzero values a token.
        density: the share of the N M pre-activations that were kept as entries.
        num_dead: how many latents are dead.
        code: the batch's code, a row for every token; :class:`Firings` where none was kept.
    """

    loss: Tensor
    fvu: Tensor
    aux: Tensor
    penalty: Tensor
    l0: Tensor
    density: float
    num_dead: int
    code: Code | Firings


class Described(NamedTuple):
    """Tokens (N, D) as a model describes them.

    Attributes:
        code: as :class:`SAELoss` returns it.
        levels: (N, D) reconstructions.
        penalty: scalar, where there is one.
        main: which of the levels is the code's.
    """

    code: Code | Firings
    levels: Sequence[Tensor]
    penalty: Tensor | None = None
    main: int = -1


class SparseAutoencoder(Model):
    """The part of an autoencoder that doesn't depend on how it encodes.

    A reconstruction is ``b_dec`` plus a few atoms, the rows of ``W_dec``; of a polynomial decoder these rows
    add up to a few coordinates, and the reconstruction is ``b_dec`` plus a cubic polynomial of them, in which
    latents act together as well as alone. Subclasses encode (:meth:`encode`), and for :meth:`loss` describe a
    batch (``_describe``) and reconstruct, by dead latents alone, what is left of it (``_revive``).

    One training step::

        out = sae.loss(x)
        out.loss.backward()
        sae.after_backward_()
        optimizer.step()
        sae.after_step_()
        sae.count_firings_(out.code)

    Args:
        d_model: D, the width of the activations.
        num_latents: M.
        unit_norm: whether the atoms of a linear decoder are kept at norm 1.
        decoder: ``"linear"``, or ``"polynomial"``, whose ``W_dec`` (M, R1) is kept orthonormal by columns.
        ranks: of a polynomial decoder (R1, R2, R3), D >= R1 >= R2 >= R3: how many coordinates there are, and
            how many of them, from the first on, have squares, and cubes.
        prefixes: ascending, below M: numbers of latents that, from the first on, are to reconstruct as well
            as they can on their own, as all do (Matryoshka).
        prefix_weights: of the losses of the prefixes, and of all latents, last; default: 1 each.
        aux_k: how many dead latents the auxiliary loss uses for a token; 0 turns it off.
        aux_weight: its weight in the loss.
        dead_after: a latent is dead when it has had no nonzero value for this many tokens.
        device, dtype: of the parameters.

    Attributes:
        W_dec: (M, D), row m is atom m; (M, R1) of a polynomial decoder. b_dec: (D,).
        polynomial: of a polynomial decoder its other parameters, ``C_1`` (D, R1), ``C_2`` (D, R2), ``C_3``
            (D, R3) and ``scales`` (2,); else None.
        tokens_since_fired: (M,) int64 buffer; :meth:`count_firings_` counts.

    Raises:
        TypeError, ValueError: a size is not a positive integer, a weight is negative or not finite, prefixes
            don't ascend below M, or ranks don't descend from D.
    """

    tokens_since_fired: Tensor
    _d_out = 0  # the width of what is reconstructed, where that isn't d_model; known before the rest is made

    def __init__(
        self,
        d_model: int,
        num_latents: int,
        *,
        unit_norm: bool,
        decoder: str = "linear",
        ranks: Sequence[int] = (),
        prefixes: Sequence[int] = (),
        prefix_weights: Sequence[float] | None = None,
        aux_k: int,
        aux_weight: float,
        dead_after: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.d_model = check_count(self._name, "d_model", d_model, 1)
        self._d_out = self._d_out or self.d_model
        self.num_latents = check_count(self._name, "num_latents", num_latents, 1)
        check_flag(self._name, "unit_norm", unit_norm)
        self.unit_norm = unit_norm
        position_of(self._name, "decoder", decoder, ("linear", "polynomial"))
        if decoder == "linear" and len(ranks):
            raise ValueError(f"{self._name}: ranks must be left out of a linear decoder, got {tuple(ranks)}")
        self.decoder, self.ranks = decoder, ()
        self.prefixes = self._ascending("prefixes", prefixes, self.num_latents - 1)
        self.prefix_weights = self._weights("prefix_weights", prefix_weights, len(self.prefixes) + 1)
        self.aux_k = check_count(self._name, "aux_k", aux_k, 0)
        self.dead_after = check_count(self._name, "dead_after", dead_after, 1)
        self.aux_weight = self._weight("aux_weight", aux_weight)
        factory = {"device": device, "dtype": dtype}
        self.polynomial: Polynomial | None = None
        if decoder == "polynomial":
            self.ranks = checked_ranks(self._name, ranks, self._d_out, self.num_latents)
            self.polynomial = Polynomial(self._d_out, self.ranks, **factory)
        self.W_dec = nn.Parameter(torch.empty(*self._decoder_shape, **factory))
        self.b_dec = nn.Parameter(torch.zeros(self._d_out, **factory))
        counts = torch.zeros(self.num_latents, dtype=torch.int64, device=device)
        self.register_buffer("tokens_since_fired", counts)

    @classmethod
    def sizes_of(cls, inputs: tuple[int, ...], targets: tuple[int, ...] | None) -> dict[str, int]:
        """``d_model``, for tokens (D,) without targets: see :meth:`Model.sizes_of`."""
        if targets is not None or len(inputs) != 1:
            raise ValueError(
                f"{cls.__name__} reconstructs inputs (N, D), without targets: got rows of shape {inputs}, "
                f"targets {targets}"
            )
        return {"d_model": inputs[0]}

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new atoms, and start again from them."""
        self.W_dec.normal_(generator=generator)
        if self.polynomial is None:
            normalize_(self.W_dec)
        else:
            wide = torch.promote_types(self.W_dec.dtype, torch.float32)
            self.W_dec.copy_(orthonormal(self.W_dec.to(wide)))
            self.polynomial.reset_parameters(generator)
        self.b_dec.zero_()
        self.tokens_since_fired.zero_()

    @torch.no_grad()
    def init_decoder_bias_(self, x: Tensor, *, method: str = "geometric_median") -> None:
        """Set ``b_dec`` to the centre of a sample of activations, before training.

        Args:
            x: (..., D) floating, at least one token.
            method: ``"geometric_median"`` (outliers count little) or ``"mean"``.

        Raises:
            ValueError: the shape or the method is wrong.

        Source: Gao et al. 2024, arXiv 2406.04093, appendix A.1.
        """
        check_rows(f"{self._name}.init_decoder_bias_", "x", x, self._d_out)
        if x.numel() == 0:
            raise ValueError(f"{self._name}.init_decoder_bias_: x must hold at least one token, got none")
        if method not in ("geometric_median", "mean"):
            raise ValueError(
                f"{self._name}.init_decoder_bias_: method must be 'geometric_median' or 'mean', "
                f"got {method!r}"
            )
        tokens = x.reshape(-1, self._d_out).to(torch.promote_types(self.b_dec.dtype, torch.float32))
        self.b_dec.copy_(tokens.mean(dim=0) if method == "mean" else geometric_median(tokens))

    @abstractmethod
    def encode(self, x: Tensor) -> Code:
        """Describe tokens (..., D) by a few latents each."""

    def decode(self, code: Code | Tensor, indices: Tensor | None = None) -> Tensor:
        """Reconstruct tokens from codes.

        Args:
            code: what :meth:`encode` returned, or the values (..., k) of a code of k entries a token.
            indices: (..., k) int64, where ``code`` holds only the values.

        Returns:
            (..., D); of a ragged code (N, D), a row for every token.

        Raises:
            TypeError: values came without indices.
        """
        offsets = None
        if indices is None:
            if isinstance(code, Tensor):
                raise TypeError(f"{self._name}.decode: indices must be given with values, got None")
            offsets = code.offsets if isinstance(code, Ragged | BatchTopK) else None
            code, indices = code[:2]
        if self.polynomial is None:
            return sparse_decode(code, indices, self.W_dec, self.b_dec, offsets)
        parts = self.polynomial.coefficients(), self.polynomial.scales
        return polynomial_decode(code, indices, self.W_dec, *parts, self.b_dec, offsets)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct tokens (..., D) from their codes."""
        return self.decode(self.encode(x)).reshape(x.shape)

    def loss(self, x: Tensor) -> SAELoss:
        """Score the reconstruction of a batch; in training mode also how well dead latents would mend it.

        With latents dead, AuxK adds ``aux_weight`` times the fraction of the residual's variance that the
        best few of them for each token leave unexplained. The residual is its fixed target.

        Nothing is changed: :meth:`count_firings_` counts. ``torch.utils.checkpoint``, which calls this again
        in the backward pass, gets the same answer as long as counting waits for that.

        Args:
            x: (..., D), at least one token.

        Returns:
            :class:`SAELoss`.

        Raises:
            TypeError, ValueError: x has the wrong dtype or shape, or no token.

        Source: Gao et al. 2024, arXiv 2406.04093, sections 2 and A.2.
        """
        dead = self.dead
        num_dead = int(dead.sum())  # first: torch.compile breaks its graph here, before there are gradients
        x = batch_of(self._name, "x", x, self.d_model)
        return self._score(x, x, spread_of(x), dead, num_dead)

    def _score(self, x: Tensor, target: Tensor, spread: Tensor, dead: Tensor, num_dead: int) -> SAELoss:
        """How well tokens x (N, d_model) are made the target, of so much spread."""
        centered = self._center(x)
        return self._scored(centered, self._describe(x, centered), target, spread, dead, num_dead)

    def _scored(
        self,
        centered: Tensor,
        described: Described,
        target: Tensor,
        spread: Tensor,
        dead: Tensor,
        num_dead: int,
    ) -> SAELoss:
        code, levels, penalty, chosen = described
        aux_k = min(self.aux_k, num_dead)
        scores = [unexplained(level, target, spread) for level in levels]
        main = total = scores[chosen]
        if len(scores) > 1:
            total = sum(w * score for w, score in zip(self._level_weights(), scores, strict=True))
        aux = main.new_zeros(())
        if penalty is None:
            penalty = aux
        else:
            total = total + penalty
        if self.training and aux_k > 0:
            residual = target.detach() - levels[chosen].detach()
            aux = unexplained(self._revive(centered, residual, dead, aux_k), residual, spread_of(residual))
            total = total + self.aux_weight * aux
        l0, density = self._counts(code, len(centered))
        return SAELoss(total, main.detach(), aux.detach(), penalty.detach(), l0, density, num_dead, code)

    @abstractmethod
    def _describe(self, x: Tensor, centered: Tensor) -> Described:
        """A batch of tokens (N, D), as they are and less ``b_dec``."""

    def _decoded(self, code: TopK | Ragged | BatchTopK) -> Sequence[Tensor]:
        """The levels of a code."""
        if not self.prefixes:
            return [self.decode(code)]
        code = code.code if isinstance(code, BatchTopK) else code
        return self._cut(by_prefix, code, (*self.prefixes, self.num_latents))

    def _cut(
        self, cut: Callable[..., list[Tensor]], code: TopK | Ragged, places: Sequence[int]
    ) -> Sequence[Tensor]:
        """The levels of a code by its pieces up to these places."""
        if self.polynomial is None:
            return cut(code, places, self.W_dec, self.b_dec)
        return [self._expanded(sums) + self.b_dec for sums in cut(code, places, self.W_dec, None)]

    def _expanded(self, sums: Tensor, *, frozen: bool = False) -> Tensor:
        """(..., D) of sums of rows of ``W_dec``, without ``b_dec``."""
        return sums if self.polynomial is None else self.polynomial(sums, frozen=frozen)

    def _atoms(self) -> Tensor:
        """(M, D): what each latent alone, at value 1, adds to ``b_dec``."""
        return self._expanded(self.W_dec)

    def _level_weights(self) -> Sequence[float]:
        return self.prefix_weights

    @abstractmethod
    def _revive(self, centered: Tensor, residual: Tensor, dead: Tensor, aux_k: int) -> Tensor:
        """The residual (fixed) of a batch as ``aux_k`` dead latents a token reconstruct it, without b_dec."""

    def _counts(self, code: Code | Firings, num_tokens: int) -> tuple[Tensor, float]:
        """The mean number of nonzero values a token, and the share of pre-activations that are entries."""
        if isinstance(code, Firings):
            return code.counts.sum() / num_tokens, int(code.num_entries) / (num_tokens * self.num_latents)
        active = self._active(code).sum(dtype=torch.float32)
        return active / num_tokens, code.values.numel() / (num_tokens * self.num_latents)

    @torch.no_grad()
    def count_firings_(self, code: Code | Firings, *, group: Group = None) -> None:
        """Count the tokens of a step, and since when each latent has not fired: had no nonzero value.

        Call after ``backward``, with the code that :meth:`loss` returned; of a step of several losses, with
        each one's. Latents are never dead without it.

        Args:
            code: what :meth:`encode` or :meth:`loss` returned for these tokens.
            group: where ``torch.distributed`` runs several processes, those that share the step's tokens,
                such as ``torch.distributed.group.WORLD``: all of them call this, and count the same.
                ``"self"`` for the tokens of this process alone. One process needs none.

        Raises:
            TypeError: code is not one, or group no process group that this process is in.
            ValueError: several processes run and no group is given.
            IndexError: the code holds latents that there are none of.
        """
        name = f"{self._name}.count_firings_"
        if not isinstance(code, Code | Firings):
            raise TypeError(f"{name}: code must be what encode or loss returned, got {named(code)}")
        M, group = self.num_latents, counting_group(name, group)
        fired = torch.zeros(M + 1, dtype=torch.bool, device=self.tokens_since_fired.device)
        num_tokens: int | Tensor
        if isinstance(code, Firings):
            fired[:M], num_tokens = code.counts > 0, code.num_tokens
        else:
            check_range(name, flat(code.indices) if code.indices.dim() > 1 else code.indices, M)
            # Only a nonzero value is a firing: a code is filled up to k.
            fired.index_fill_(0, torch.where(self._active(code), code.indices, M).flatten(), True)
            ragged = isinstance(code, Ragged | BatchTopK)
            num_tokens = code.offsets.shape[0] - 1 if ragged else code.indices.shape[:-1].numel()
        if group is not None:
            totals = fired.to(torch.int64)
            totals[M] = num_tokens
            distributed.all_reduce(totals, group=group)
            fired, num_tokens = totals > 0, totals[M]
        self.tokens_since_fired.add_(num_tokens).masked_fill_(fired[:M], 0)

    def after_backward_(self) -> None:
        """What a training step does between ``backward`` and the optimiser's step."""
        if self.unit_norm and self.polynomial is None:
            self.remove_parallel_gradient_()

    def after_step_(self) -> None:
        """What a training step does after the optimiser's step."""
        if self.polynomial is not None:
            self.orthonormalize_decoder_()
        elif self.unit_norm:
            self.normalize_decoder_()

    @property
    def dead(self) -> Tensor:
        """(M,) bool: latents that have had no nonzero value for ``dead_after`` tokens."""
        return self.tokens_since_fired >= self.dead_after

    @torch.no_grad()
    def remove_parallel_gradient_(self) -> None:
        """Take from the gradient of each atom its part along the atom: what would only change the norm.

        Call between ``backward`` and the optimiser's step. The atoms must have norm 1, which
        :meth:`normalize_decoder_` gives to those that come from elsewhere. Of a sharded ``W_dec`` (a DTensor)
        each process handles its own rows.

        Raises:
            ValueError: ``W_dec`` is sharded otherwise than by rows, or the decoder is not linear.

        Source: Gao et al. 2024, arXiv 2406.04093, appendix A.1.
        """
        self._reshard()
        method = self._of_decoder("remove_parallel_gradient_", "linear")
        own = own_rows(method, "W_dec", self.W_dec, self._decoder_shape)
        if self.W_dec.grad is not None:
            remove_parallel_(own_rows(method, "W_dec.grad", self.W_dec.grad, self._decoder_shape), own)

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Scale every atom to norm 1; an atom of zeros stays. Call after the optimiser's step.

        Of a sharded ``W_dec`` (a DTensor) each process handles its own rows.

        Raises:
            ValueError: ``W_dec`` is sharded otherwise than by rows, or the decoder is not linear.
        """
        self._reshard()
        method = self._of_decoder("normalize_decoder_", "linear")
        normalize_(own_rows(method, "W_dec", self.W_dec, self._decoder_shape))

    @torch.no_grad()
    def orthonormalize_decoder_(self) -> None:
        """Make the columns of a polynomial decoder's ``W_dec`` orthonormal again, after the optimiser's step.

        It becomes the Q of its QR decomposition whose R has a positive diagonal. Of a sharded ``W_dec`` (a
        DTensor) each process handles its own rows. Columns that have become dependent take longer, and the
        log says so.

        Raises:
            ValueError: ``W_dec`` is sharded otherwise than by rows, or the decoder is not polynomial.

        Source: Koromilas et al. 2026, arXiv 2602.01322, section 3.
        """
        self._reshard()
        method = self._of_decoder("orthonormalize_decoder_", "polynomial")
        own = own_rows(method, "W_dec", self.W_dec, self._decoder_shape)
        retract_(own, lambda total: sum_of_rows_(total, self.W_dec), lambda rows: all_rows(rows, self.W_dec))

    def pair_interactions(self, first: Tensor, second: Tensor) -> Tensor:
        """What two latents, at value 1, add beyond what each adds alone, of a polynomial decoder.

        Args:
            first, second: (P,) int64, the latents of P pairs.

        Returns:
            (P, D): vectors whose norms say how strongly the two interact, and whose directions where to.

        Raises:
            IndexError: an index is outside [0, M).
            ValueError: the decoder is not polynomial.

        Example:
            >>> import torch
            >>> from fastsparse.nn import TopKSAE
            >>> sae = TopKSAE(8, 32, k=4, decoder="polynomial", ranks=(8, 4, 4))
            >>> sae.pair_interactions(torch.tensor([0, 1]), torch.tensor([2, 3])).shape
            torch.Size([2, 8])

        Source: Koromilas et al. 2026, arXiv 2602.01322.
        """
        method = self._of_decoder("pair_interactions", "polynomial")
        for latents in (first, second):
            check_range(method, latents, self.num_latents)
        return self.polynomial.pairs(self.W_dec[first], self.W_dec[second])

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, num_latents={self.num_latents}, aux_k={self.aux_k}, "
            f"aux_weight={self.aux_weight:g}, dead_after={self.dead_after}, unit_norm={self.unit_norm}"
            + (f", decoder={self.decoder!r}, ranks={self.ranks}" if self.ranks else "")
            + (f", prefixes={self.prefixes}" if self.prefixes else "")
        )

    def _center(self, x: Tensor) -> Tensor:
        # Centred before the product and not folded into a bias: the products of an atom with x and with b_dec
        # may cancel.
        check_rows(self._name, "x", x, self.d_model)
        return x - self.b_dec

    def _reshard(self) -> None:
        """FSDP2 may have left the gathered parameters in place: what is written to those is lost."""
        if reshard := getattr(self, "reshard", None):
            reshard()

    @staticmethod
    def _active(code: Code) -> Tensor:
        return code.values.detach().abs() > 0  # not NaN

    @property
    def _decoder_shape(self) -> tuple[int, int]:
        return self.num_latents, self.ranks[0] if self.ranks else self._d_out

    def _of_decoder(self, method: str, kind: str) -> str:
        """The name of a method that only one kind of decoder has."""
        name = f"{self._name}.{method}"
        if self.decoder != kind:
            raise ValueError(f"{name}: decoder must be {kind!r}, got {self.decoder!r}")
        return name


def batch_of(name: str, argument: str, x: Tensor, width: int) -> Tensor:
    """Tokens (..., D) as (N, D), at least one."""
    check_rows(name, argument, x, width)
    x = flat(x) if x.dim() > 1 else x.unsqueeze(0)
    if len(x) == 0:
        raise ValueError(f"{name}: {argument} must hold at least one token, got shape {tuple(x.shape)}")
    return x
