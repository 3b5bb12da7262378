"""Small autoencoders, tokens, training and textbooks, for every kind of autoencoder."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsparse.nn import MatchingPursuitSAE, SAELoss, SparseAutoencoder, TopKSAE

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


def train(sae: SparseAutoencoder, atoms: Tensor, steps: int) -> SAELoss:
    """On sums of two of the atoms, away from the origin."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(6)
    for _ in range(steps):
        chosen = torch.rand(64, len(atoms), generator=generator).topk(2, dim=1).indices
        optimizer.zero_grad()
        out = sae.loss((atoms[chosen] * (1 + torch.rand(64, 2, 1, generator=generator))).sum(dim=1))
        out.loss.backward()
        sae.remove_parallel_gradient_()
        optimizer.step()
        sae.normalize_decoder_()
        sae.count_firings_(out.code)
    return out


def textbook_loss(sae: SparseAutoencoder, x: Tensor, dead: Tensor | None = None) -> Tensor:
    """In dense codes, of which PyTorch takes the gradient itself."""
    left = {TopKSAE: _left_by_topk, MatchingPursuitSAE: _left_by_pursuit}[type(sae)]
    residual = left(sae, x)
    loss = residual.pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    if dead is not None:
        error = residual.detach()
        again = left(sae, x, error, dead, min(sae.aux_k, int(dead.sum())))
        loss = loss + sae.aux_weight * again.pow(2).sum() / (error - error.mean(0)).pow(2).sum()
    return loss


def _left_by_topk(sae: TopKSAE, x: Tensor, error=None, dead=None, aux_k=0) -> Tensor:
    """Of x by the k largest, rectified; or of an error by the largest of the dead."""
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    pre = pre if dead is None else pre.masked_fill(~dead, -torch.inf)
    top = pre.topk(sae.k if dead is None else aux_k, dim=1)
    code = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    return (x - sae.b_dec if dead is None else error) - code @ sae.W_dec


def _left_by_pursuit(sae: MatchingPursuitSAE, x: Tensor, error=None, dead=None, aux_k=0) -> Tensor:
    if dead is None:
        return textbook_pursuit(x - sae.b_dec, sae.W_dec, sae.k, sae.nonnegative)
    return textbook_pursuit(error, sae.W_dec[dead], aux_k, sae.nonnegative)


def textbook_pursuit(r: Tensor, atoms: Tensor, k: int, nonnegative: bool) -> Tensor:
    """What is left of rows, which stop where no score is positive."""
    for _ in range(k):
        scores = r @ atoms.T
        best = (scores if nonnegative else scores.abs()).max(dim=1)
        chosen = F.one_hot(best.indices, len(atoms)) * (best.values > 0).unsqueeze(1)
        r = r - (scores * chosen) @ atoms
    return r
