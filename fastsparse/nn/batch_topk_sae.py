"""The BatchTopK sparse autoencoder: k latents a token on average, chosen in the batch as a whole."""

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from fastsparse.functional import BatchTopK, Ragged, batch_topk_encode, threshold_encode
from fastsparse.functional._tensors import flat
from fastsparse.nn._threshold import Thresholded
from fastsparse.nn.sparse_autoencoder import Code, Described, Firings


class BatchTopKSAE(Thresholded):
    """A sparse autoencoder that describes a batch by its strongest latents, k for each token on average.

    Of all N M scores ``W_enc (x - b_dec) + b_enc`` of a batch the ``floor(k N)`` largest are kept, rectified:
    tokens that need more latents get them. What a token's code is then depends on the batch. So in evaluation
    mode a latent is kept where its score is above ``threshold``, the moving average of the least positive
    score that was kept in training.

    For a training step see :class:`SparseAutoencoder`; its :meth:`count_firings_` follows the threshold.

    Args:
        d_model: D, the width of the activations.
        num_latents: M.
        k: how many latents describe a token on average, 0 < k <= M; it may be a fraction.
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
        threshold_decay: of the moving average.
        device, dtype: of the parameters.
        generator: source of the initial atoms, on the parameters' device; default: PyTorch's global one.

    Attributes:
        W_enc: (M, D); b_enc: (M,); W_dec: (M, D), row m is atom m; b_dec: (D,).
        threshold: scalar fp32 buffer, 0 before the first training step.
        tokens_since_fired: (M,) int64 buffer; :meth:`count_firings_` counts.

    Raises:
        TypeError, ValueError: a size is not a positive integer, or an option is out of its range.

    Example:
        >>> import torch
        >>> from fastsparse.nn import BatchTopKSAE
        >>> sae = BatchTopKSAE(d_model=8, num_latents=32, k=2.5)
        >>> x = torch.randn(16, 8)
        >>> out = sae.loss(x)
        >>> out.code.values.shape, out.code.offsets.shape
        (torch.Size([40]), torch.Size([17]))
        >>> sae.count_firings_(out.code)
        >>> sae.eval()(x).shape
        torch.Size([16, 8])

    Source: Bussmann et al. 2024, "BatchTopK Sparse Autoencoders", arXiv 2412.06410.
    """

    def __init__(
        self,
        d_model: int,
        num_latents: int,
        k: float,
        *,
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
        k = k.item() if hasattr(k, "item") else k  # of NumPy or PyTorch
        if isinstance(k, bool) or not isinstance(k, int | float):
            raise TypeError(f"{self._name}: k must be a number, got {k!r} of type {type(k).__name__}")
        if not 0 < k <= self.num_latents:
            raise ValueError(
                f"{self._name}: k must be above 0 and at most num_latents ({self.num_latents}), got k={k}"
            )
        self.k = k
        self._share = Fraction(repr(k)).as_integer_ratio()  # as it was written: 0.29 of 100 is 29
        self.reset_parameters(generator)

    def encode(self, x: Tensor) -> BatchTopK | Ragged:
        """Describe tokens: in training mode by the strongest latents of them all, else by the threshold.

        Args:
            x: (..., D), the dtype of the parameters, or one that it covers.

        Returns:
            In training mode a :class:`fastsparse.BatchTopK`, else a :class:`fastsparse.Ragged`, whose rows
            are the tokens.

        Raises:
            RuntimeError: in evaluation mode, when no training step has been counted.
        """
        return self._encode(self._center(x))

    def _encode(self, centered: Tensor) -> BatchTopK | Ragged:
        if not self.training:
            return self._by_threshold(centered)
        rows = flat(centered)
        k, tokens = self._share
        total = rows.shape[0] * k // tokens
        if total > 0:
            return batch_topk_encode(rows, self.W_enc, self.b_enc, total=total)
        none = torch.zeros(rows.shape[0] + 1, dtype=torch.int64, device=rows.device)
        return BatchTopK(rows.flatten()[:0], none[:0], none, self.threshold.new_zeros(()))

    def _by_threshold(self, centered: Tensor) -> Ragged:
        threshold = self.threshold.expand(self.num_latents)
        if not torch.compiler.is_compiling() and not bool(self.threshold > 0):
            raise RuntimeError(
                f"{self._name}: threshold must be known in evaluation mode, got 0: count_firings_ follows it "
                "in training"
            )
        values, indices, offsets = threshold_encode(
            flat(centered), self.W_enc, self.b_enc, threshold=threshold
        )
        return Ragged(values.to(centered.dtype), indices, offsets)

    def _describe(self, x: Tensor, centered: Tensor) -> Described:
        code = self._encode(centered)
        return Described(code, self._decoded(code))

    def _least_positive(self, code: Code | Firings) -> Tensor:
        if not isinstance(code, BatchTopK):  # of evaluation
            return torch.zeros(2, device=self.threshold.device)
        there = code.threshold > 0
        return torch.stack([torch.where(there, code.threshold, 0), there]).float()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, k={self.k}"
