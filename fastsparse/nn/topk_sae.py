"""The TopK sparse autoencoder with unit-norm atoms and an auxiliary loss that revives dead latents."""

import math

import torch
from torch import Tensor, nn

from fastsparse._validation import check_count
from fastsparse.functional import TopK, spmm, topk_encode
from fastsparse.nn.sparse_autoencoder import SparseAutoencoder


class TopKSAE(SparseAutoencoder):
    """A sparse autoencoder that describes every token by its k strongest latents.

    ``z = relu(topk(W_enc (x - b_dec) + b_enc))``, reconstruction ``z W_dec + b_dec``. The rows of ``W_dec``
    (the atoms) start with norm 1, ``W_enc`` as a copy of ``W_dec``, both biases as 0.

    One training step::

        out = sae.loss(x)
        out.loss.backward()
        sae.remove_parallel_gradient_()
        optimizer.step()
        sae.normalize_decoder_()
        sae.count_firings_(out.code)

    Args:
        d_model: D, the width of the activations.
        num_latents: M.
        k: how many latents describe a token, 1 <= k <= M.
        aux_k: how many dead latents the auxiliary loss uses for a token; 0 turns it off. Default: the power
            of two nearest to D / 2.
        aux_weight: its weight in the loss.
        dead_after: a latent is dead when it has not been positive for this many tokens.
        device, dtype: of the parameters.
        generator: source of the initial atoms, on the parameters' device; default: PyTorch's global one.

    Attributes:
        W_enc: (M, D); b_enc: (M,); W_dec: (M, D), row m is atom m; b_dec: (D,).
        tokens_since_fired: (M,) int64 buffer; :meth:`count_firings_` counts.

    Raises:
        TypeError, ValueError: a size is not a positive integer, or k is above M.

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
        aux_k: int | None = None,
        aux_weight: float = 1 / 32,
        dead_after: int = 10_000_000,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        d_model = check_count(self._name, "d_model", d_model, 1)
        if aux_k is None:
            aux_k = 2 ** max(0, round(math.log2(d_model / 2)))
        factory = {"device": device, "dtype": dtype}
        super().__init__(
            d_model, num_latents, k, aux_k=aux_k, aux_weight=aux_weight, dead_after=dead_after, **factory
        )
        if self.k > self.num_latents:
            raise ValueError(f"TopKSAE: k must be at most num_latents ({self.num_latents}), got k={self.k}")
        self.W_enc = nn.Parameter(torch.empty(self.num_latents, d_model, **factory))
        self.b_enc = nn.Parameter(torch.zeros(self.num_latents, **factory))
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new atoms, and start again from them."""
        super().reset_parameters(generator)
        self.W_enc.copy_(self.W_dec)
        self.b_enc.zero_()

    def encode(self, x: Tensor) -> TopK:
        """Describe tokens by their k strongest latents.

        Args:
            x: (..., D), the dtype of the parameters, or one that it covers.

        Returns:
            :class:`fastsparse.TopK` ``(values, indices)``, both (..., k), largest first, values at least 0.
        """
        return self._encode(self._center(x))

    def _encode(self, centered: Tensor, *, k: int | None = None, latent_mask: Tensor | None = None) -> TopK:
        k = self.k if k is None else k
        return topk_encode(centered, self.W_enc, self.b_enc, k=k, latent_mask=latent_mask)

    def _reconstruct(self, x: Tensor, centered: Tensor) -> tuple[TopK, Tensor]:
        code = self._encode(centered)
        return code, self.decode(code)

    def _revive(self, centered: Tensor, residual: Tensor, dead: Tensor, aux_k: int) -> Tensor:
        """By the strongest dead latents; the gradient reaches their rows of both matrices, and b_dec."""
        return spmm(*self._encode(centered, k=aux_k, latent_mask=dead), self.W_dec)
