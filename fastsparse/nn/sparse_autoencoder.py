"""What every sparse autoencoder here has: unit-norm atoms, a centre, and dead latents to be revived."""

import math
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, distributed, nn

from fastsparse._validation import check_code, check_count, check_range, check_rows
from fastsparse.functional import Pursuit, TopK, sparse_decode
from fastsparse.functional._tensors import flat
from fastsparse.nn.fvu import fvu

# Rows of a parameter matrix are handled in blocks of about this many numbers, so that a second look at a row
# finds it in the cache.
_BLOCK = 2**18


class SAELoss(NamedTuple):
    """What :meth:`SparseAutoencoder.loss` returns.

    Attributes:
        loss: scalar to minimise: ``fvu + aux_weight * aux``.
        fvu: scalar, the fraction of the batch's variance that the reconstruction leaves unexplained.
        aux: scalar, the same of the residual as dead latents reconstruct it; 0 with nothing to revive.
        l0: scalar, the mean number of nonzero values a token.
        num_dead: how many latents are dead.
        code: the batch's code, as ``encode`` returns it.
    """

    loss: Tensor
    fvu: Tensor
    aux: Tensor
    l0: Tensor
    num_dead: int
    code: TopK | Pursuit


class SparseAutoencoder(nn.Module, ABC):
    """The part of an autoencoder that doesn't depend on how it encodes.

    A reconstruction is ``b_dec`` plus a few atoms, the rows of ``W_dec``, which start with norm 1. Subclasses
    encode (:meth:`encode`), and reconstruct for :meth:`loss` a batch (``_reconstruct``) and, by dead latents
    alone, what is left of it (``_revive``).

    Args:
        d_model: D, the width of the activations.
        num_latents: M.
        k: how many latents describe a token.
        aux_k: how many dead latents the auxiliary loss uses for a token; 0 turns it off.
        aux_weight: its weight in the loss.
        dead_after: a latent is dead when it has had no nonzero value for this many tokens.
        device, dtype: of the parameters.

    Attributes:
        W_dec: (M, D), row m is atom m; b_dec: (D,).
        tokens_since_fired: (M,) int64 buffer; :meth:`count_firings_` counts.

    Raises:
        TypeError, ValueError: a size is not a positive integer, or aux_weight is negative or not finite.
    """

    tokens_since_fired: Tensor

    def __init__(
        self,
        d_model: int,
        num_latents: int,
        k: int,
        *,
        aux_k: int,
        aux_weight: float,
        dead_after: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if not (math.isfinite(aux_weight) and aux_weight >= 0):
            raise ValueError(f"{self._name}: aux_weight must be finite and at least 0, got {aux_weight}")
        self.d_model = check_count(self._name, "d_model", d_model, 1)
        self.num_latents = check_count(self._name, "num_latents", num_latents, 1)
        self.k = check_count(self._name, "k", k, 1)
        self.aux_k = check_count(self._name, "aux_k", aux_k, 0)
        self.dead_after = check_count(self._name, "dead_after", dead_after, 1)
        self.aux_weight = aux_weight
        factory = {"device": device, "dtype": dtype}
        self.W_dec = nn.Parameter(torch.empty(self.num_latents, self.d_model, **factory))
        self.b_dec = nn.Parameter(torch.zeros(self.d_model, **factory))
        counts = torch.zeros(self.num_latents, dtype=torch.int64, device=device)
        self.register_buffer("tokens_since_fired", counts)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new atoms, and start again from them."""
        self.W_dec.normal_(generator=generator)
        self.normalize_decoder_()
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
        check_rows(f"{self._name}.init_decoder_bias_", "x", x, self.d_model)
        if x.numel() == 0:
            raise ValueError(f"{self._name}.init_decoder_bias_: x must hold at least one token, got none")
        if method not in ("geometric_median", "mean"):
            raise ValueError(
                f"{self._name}.init_decoder_bias_: method must be 'geometric_median' or 'mean', "
                f"got {method!r}"
            )
        tokens = x.reshape(-1, self.d_model).to(torch.promote_types(self.b_dec.dtype, torch.float32))
        self.b_dec.copy_(tokens.mean(dim=0) if method == "mean" else _geometric_median(tokens))

    @abstractmethod
    def encode(self, x: Tensor) -> TopK | Pursuit:
        """Describe tokens (..., D) by a few latents each."""

    def decode(self, code: TopK | Pursuit | Tensor, indices: Tensor | None = None) -> Tensor:
        """Reconstruct tokens from codes.

        Args:
            code: what :meth:`encode` returned, or its values (..., k).
            indices: (..., k) int64, where ``code`` holds only the values.

        Returns:
            (..., D).

        Raises:
            TypeError: values came without indices.
        """
        if indices is None:
            if isinstance(code, Tensor):
                raise TypeError(f"{self._name}.decode: indices must be given with values, got None")
            code, indices = code[:2]
        return sparse_decode(code, indices, self.W_dec, self.b_dec)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct tokens (..., D) from their codes."""
        return self.decode(self.encode(x))

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
        aux_k = min(self.aux_k, num_dead)
        centered = self._center(x)
        code, reconstruction = self._reconstruct(x, centered)
        main = total = fvu(reconstruction, x)
        aux = main.new_zeros(())
        if self.training and aux_k > 0:
            residual = x.detach() - reconstruction.detach()
            aux = fvu(self._revive(centered, residual, dead, aux_k), residual)
            total = main + self.aux_weight * aux
        l0 = self._active(code).sum(dim=-1).float().mean()
        return SAELoss(total, main.detach(), aux.detach(), l0, num_dead, code)

    @abstractmethod
    def _reconstruct(self, x: Tensor, centered: Tensor) -> tuple[TopK | Pursuit, Tensor]:
        """The code of a batch, and what it stands for."""

    @abstractmethod
    def _revive(self, centered: Tensor, residual: Tensor, dead: Tensor, aux_k: int) -> Tensor:
        """The residual (fixed) of a batch as ``aux_k`` dead latents a token reconstruct it, without b_dec."""

    @torch.no_grad()
    def count_firings_(
        self, code: TopK | Pursuit, *, group: "distributed.ProcessGroup | Literal['self'] | None" = None
    ) -> None:
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
        if not isinstance(code, TopK | Pursuit):
            raise TypeError(f"{name}: code must be a TopK or a Pursuit, got {type(code).__name__}")
        indices = check_code(name, code.values, code.indices)
        M, group = self.num_latents, _group(name, group)
        check_range(name, flat(indices), M)
        fired = torch.zeros(M + 1, dtype=torch.bool, device=code.values.device)
        # Only a nonzero value is a firing: a code is filled up to k.
        fired.index_fill_(0, torch.where(self._active(code), indices, M).flatten(), True)
        num_tokens: int | Tensor = indices.shape[:-1].numel()
        if group is not None:
            totals = fired.to(torch.int64)
            totals[M] = num_tokens
            distributed.all_reduce(totals, group=group)
            fired, num_tokens = totals > 0, totals[M]
        self.tokens_since_fired.add_(num_tokens).masked_fill_(fired[:M], 0)

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
            ValueError: ``W_dec`` is sharded otherwise than by rows.

        Source: Gao et al. 2024, arXiv 2406.04093, appendix A.1.
        """
        self._reshard()
        own = self._own_rows("remove_parallel_gradient_", "W_dec", self.W_dec)
        if self.W_dec.grad is None:
            return
        gradient = self._own_rows("remove_parallel_gradient_", "W_dec.grad", self.W_dec.grad)
        for atoms, grad in zip(_row_blocks(own), _row_blocks(gradient), strict=True):
            along = (grad * atoms).sum(dim=1, keepdim=True)
            grad.addcmul_(atoms, along, value=-1)

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Scale every atom to norm 1; an atom of zeros stays. Call after the optimiser's step.

        Of a sharded ``W_dec`` (a DTensor) each process handles its own rows.

        Raises:
            ValueError: ``W_dec`` is sharded otherwise than by rows.
        """
        self._reshard()
        wide = torch.promote_types(self.W_dec.dtype, torch.float32)
        for atoms in _row_blocks(self._own_rows("normalize_decoder_", "W_dec", self.W_dec)):
            norms = torch.linalg.vector_norm(atoms, dim=1, keepdim=True, dtype=wide)
            atoms.div_(norms.clamp_min_(torch.finfo(wide).tiny))

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, num_latents={self.num_latents}, k={self.k}, aux_k={self.aux_k}, "
            f"aux_weight={self.aux_weight:g}, dead_after={self.dead_after}"
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

    def _own_rows(self, method: str, name: str, matrix: Tensor) -> Tensor:
        """The rows of a (M, D) matrix that this process holds, each of them whole."""
        shape = (self.num_latents, self.d_model)
        if matrix.shape != shape:  # as FSDP1 and ZeRO-3 leave parameters, outside of their contexts
            raise ValueError(
                f"{self._name}.{method}: {name} must have shape (num_latents, d_model) = {shape}, "
                f"got shape {tuple(matrix.shape)}; gather what is sharded otherwise than by rows first"
            )
        placements = getattr(matrix, "placements", None)  # importing DTensor to ask for it takes seconds
        if placements is None:
            return matrix
        if not all(place.is_replicate() or getattr(place, "dim", None) == 0 for place in placements):
            raise ValueError(
                f"{self._name}.{method}: {name} must be sharded by rows, Shard(0), or replicated, "
                f"got placements {tuple(placements)}"
            )
        return matrix.to_local()

    @staticmethod
    def _active(code: TopK | Pursuit) -> Tensor:
        return code.values.detach().abs() > 0  # not NaN

    @property
    def _name(self) -> str:
        return type(self).__name__


def _group(
    name: str, group: "distributed.ProcessGroup | Literal['self'] | None"
) -> "distributed.ProcessGroup | None":
    """The processes to count with, None for this one alone; which, where there are several, is never guessed.

    Tokens of others that are left out make latents dead that fire, and waiting for processes that don't count
    would hang.
    """
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if group is None and several:
        raise ValueError(
            f"{name}: group must say whose tokens are counted where {distributed.get_world_size()} processes "
            "run: torch.distributed.group.WORLD for data parallelism, 'self' for this process alone; got None"
        )
    if group is None or (isinstance(group, str) and group == "self"):
        return None
    if not isinstance(group, distributed.ProcessGroup):  # such as what new_group returns to other processes
        raise TypeError(
            f"{name}: group must be a process group that this process is in, or 'self', got {group!r}"
        )
    return group


def _row_blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    """Views of a few rows each on the CPU; the whole matrix elsewhere, where launches cost more."""
    if matrix.device.type != "cpu":
        return (matrix,)
    return matrix.split(max(1, _BLOCK // matrix.shape[1]))


def _geometric_median(points: Tensor, *, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least sum of distances to all, by Weiszfeld's iteration (Tohoku Math J 43, 1937)."""
    median = points.mean(dim=0)
    for _ in range(iterations):
        distances = torch.linalg.vector_norm(points - median, dim=1)
        # A point under the current median would get infinite weight: at 1e-8 of the mean distance it stops.
        nearest = (1e-8 * distances.mean()).clamp_min(torch.finfo(points.dtype).tiny)
        weights = nearest / distances.clamp_min(nearest)
        before, median = median, (weights / weights.sum()) @ points
        if torch.linalg.vector_norm(median - before) <= tolerance * torch.linalg.vector_norm(median):
            break
    return median
