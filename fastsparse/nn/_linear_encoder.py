"""Autoencoders that encode by one product: scores ``W_enc (x - b_dec) + b_enc``, of which few are kept."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastsparse.functional import spmm, topk_encode
from fastsparse.nn._atoms import normalize_
from fastsparse.nn.sparse_autoencoder import SparseAutoencoder


class LinearEncoder(SparseAutoencoder):
    """Has ``W_enc`` (M, D), which starts as the decoder's atoms of norm 1, and ``b_enc`` (M,), of 0."""

    _activation = "relu"  # of the dead latents that are revived
    _wide: tuple[str, ...] = ()  # buffers in fp32, whatever the dtype of the parameters

    def __init__(
        self,
        d_model: int,
        num_latents: int,
        *,
        aux_k: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        **options,
    ) -> None:
        super().__init__(
            d_model,
            num_latents,
            aux_k=power_of_two_near_half(d_model) if aux_k is None else aux_k,
            device=device,
            dtype=dtype,
            **options,
        )
        self.W_enc = nn.Parameter(torch.empty(self.num_latents, self.d_model, device=device, dtype=dtype))
        self.b_enc = nn.Parameter(torch.zeros(self.num_latents, device=device, dtype=dtype))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new atoms, and start again from them."""
        super().reset_parameters(generator)
        self._start_encoder(generator)
        self.b_enc.zero_()

    def _start_encoder(self, generator: torch.Generator | None) -> None:
        self.W_enc.copy_(self._atoms())
        if self.polynomial is not None:
            normalize_(self.W_enc)

    def _revive(self, centered: Tensor, residual: Tensor, dead: Tensor, aux_k: int) -> Tensor:
        """By the strongest dead latents; the gradient reaches their rows of both matrices, and b_dec."""
        code = topk_encode(
            centered, self.W_enc, self.b_enc, k=aux_k, latent_mask=dead, activation=self._activation
        )
        return self._expanded(spmm(*code, self.W_dec))

    def _apply(self, fn: Any, recurse: bool = True) -> "LinearEncoder":
        """``to(dtype)`` is of the parameters."""
        before = {name: self.get_buffer(name) for name in self._wide}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if (moved := self.get_buffer(name)).dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self


def power_of_two_near_half(d_model: int) -> int:
    """How many dead latents revive a token, by Gao et al. 2024, arXiv 2406.04093, appendix A.2."""
    return 2 ** max(0, round(math.log2(max(1, d_model) / 2)))
