"""Small autoencoders and tokens, the same for every kind."""

import torch
from torch import Tensor

from fastsparse.nn.sparse_autoencoder import SparseAutoencoder

D, M, K = 12, 40, 5


def make(
    kind: type[SparseAutoencoder],
    seed: int = 0,
    *,
    d_model: int = D,
    num_latents: int = M,
    k: int = K,
    **options,
) -> SparseAutoencoder:
    return kind(d_model, num_latents, k, generator=torch.Generator().manual_seed(seed), **options)


def scrambled(kind: type[SparseAutoencoder], seed: int = 2, **options) -> SparseAutoencoder:
    """In fp64, with every parameter away from its initial value; atoms of norm 1."""
    sae = make(kind, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    sae.normalize_decoder_()
    return sae


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(sae: SparseAutoencoder, loss: Tensor) -> dict[str, Tensor]:
    names = [name for name, _ in sae.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(sae.parameters())), strict=True))
