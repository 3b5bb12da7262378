"""The matching pursuit sparse autoencoder: a tied dictionary of unit-norm atoms, taken greedily."""

import torch
from torch import Tensor

from fastsparse._validation import UnitNormError, check_count
from fastsparse.functional import Pursuit, matching_pursuit
from fastsparse.nn.sparse_autoencoder import Described, SparseAutoencoder


class MatchingPursuitSAE(SparseAutoencoder):
    """A sparse autoencoder that describes every token in steps, each by what explains most of the rest.

    From ``r = x - b_dec``, k times: of the atom w, a row of ``W_dec``, with the largest ``c = w @ r``, c
    times w is taken from r. The reconstruction is ``b_dec`` plus what was taken. The one dictionary both
    encodes and decodes. A step sees what the steps before it left, so that k can be chosen again after
    training: more steps, less error.

    For a training step see :class:`SparseAutoencoder`.

    Args:
        d_model: D, the width of the activations.
        num_latents: M, the number of atoms.
        k: how many steps describe a token, k >= 1; an atom may be taken again.
        nonnegative: only positive values, as long as any atom has a positive ``w @ r``. False takes the
            largest ``|w @ r|``.
        aux_k: how many steps the auxiliary loss goes on for, by dead atoms alone; 0 turns it off. Default: k.
        aux_weight: its weight in the loss.
        dead_after: an atom is dead when it has not been taken for this many tokens.
        device, dtype: of the parameters.
        generator: source of the initial atoms, on the parameters' device; default: PyTorch's global one.

    Attributes:
        W_dec: (M, D), row m is atom m, of norm 1; b_dec: (D,).
        tokens_since_fired: (M,) int64 buffer; :meth:`count_firings_` counts.

    Raises:
        TypeError, ValueError: a size is not a positive integer.

    Example:
        >>> import torch
        >>> from fastsparse.nn import MatchingPursuitSAE
        >>> sae = MatchingPursuitSAE(d_model=8, num_latents=32, k=4)
        >>> x = torch.randn(16, 8)
        >>> sae(x).shape, sae.encode(x).indices.shape, sae.encode(x, k=10, tol=0.1).indices.shape
        (torch.Size([16, 8]), torch.Size([16, 4]), torch.Size([16, 10]))
        >>> sae.loss(x).loss.backward()

    Source: Costa et al. 2025, "From Flat to Hierarchical: Extracting Sparse Representations with Matching
    Pursuit", arXiv 2506.03093, section 3.
    """

    def __init__(
        self,
        d_model: int,
        num_latents: int,
        k: int,
        *,
        nonnegative: bool = True,
        aux_k: int | None = None,
        aux_weight: float = 1 / 32,
        dead_after: int = 10_000_000,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        k = check_count(self._name, "k", k, 1)
        super().__init__(
            d_model,
            num_latents,
            unit_norm=True,
            aux_k=k if aux_k is None else aux_k,
            aux_weight=aux_weight,
            dead_after=dead_after,
            device=device,
            dtype=dtype,
        )
        self.k = k
        if not isinstance(nonnegative, bool):
            raise TypeError(f"MatchingPursuitSAE: nonnegative must be a bool, got {nonnegative!r}")
        self.nonnegative = nonnegative
        self.reset_parameters(generator)

    def encode(self, x: Tensor, k: int | None = None, tol: float = 0.0) -> Pursuit:
        """Describe tokens by the atoms that explain most of them, one after the other.

        Args:
            x: (..., D), the dtype of the parameters, or one that it covers.
            k: how many steps at most; default: that of the training.
            tol: a token gets no further steps once the norm of its residual is at most this; 0 for never.

        Returns:
            :class:`fastsparse.Pursuit` ``(values, indices, residual)``, of shapes (..., k), (..., k) and
            (..., D); value 0 and index 0 in slots that a token didn't use. The residual is x less its
            reconstruction.

        Raises:
            ValueError: x has the wrong shape, k < 1, tol < 0, or the atoms have lost their norm of 1, which
                :meth:`normalize_decoder_` gives back to them.
        """
        return self._pursue(self._center(x), self.W_dec, self.k if k is None else k, tol)

    def _pursue(self, x: Tensor, atoms: Tensor, k: int, tol: float = 0.0) -> Pursuit:
        try:
            return matching_pursuit(x, atoms, k=k, tol=tol, nonnegative=self.nonnegative, normalized=True)
        except UnitNormError as error:
            _, found = error.args
            raise ValueError(
                f"{self._name}: W_dec must have {found}; normalize_decoder_() gives it to them"
            ) from None

    def _describe(self, x: Tensor, centered: Tensor) -> Described:
        """What was taken is x less the residual: no need to add it up again."""
        code = self._pursue(centered, self.W_dec, self.k)
        return Described(code, [x - code.residual])

    def _revive(self, centered: Tensor, residual: Tensor, dead: Tensor, aux_k: int) -> Tensor:
        """By going on with dead atoms alone; their gradient is all that comes of it."""
        (rows,) = dead.nonzero(as_tuple=True)
        atoms = self.W_dec.index_select(0, rows)
        return residual - self._pursue(residual, atoms, aux_k).residual

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, k={self.k}, nonnegative={self.nonnegative}"
