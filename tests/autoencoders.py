"""Small autoencoders, tokens, training and textbooks, for every kind of autoencoder."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsparse.nn import (
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatchingPursuitSAE,
    ReLUSAE,
    SAELoss,
    SparseAutoencoder,
)

D, M, K = 12, 40, 5

# Of the kinds that have no k.
OPTIONS = {
    JumpReLUSAE: {"threshold": 0.5, "bandwidth": 0.6, "penalty_weight": 0.01, "dense": "sparse"},
    GatedSAE: {"l1": 0.01, "dense": "sparse"},
    ReLUSAE: {"l1": 0.01, "p": 0.7, "dense": "sparse"},
}


def make(
    kind: type[SparseAutoencoder],
    seed: int = 0,
    *,
    d_model: int = D,
    num_latents: int = M,
    k: int = K,
    **options,
) -> SparseAutoencoder:
    sizes = (d_model, num_latents) if kind in OPTIONS else (d_model, num_latents, k)
    options = OPTIONS.get(kind, {}) | options
    return kind(*sizes, generator=torch.Generator().manual_seed(seed), **options)


def scrambled(kind: type[SparseAutoencoder], seed: int = 2, **options) -> SparseAutoencoder:
    """In fp64, with every parameter away from its initial value; atoms of norm 1."""
    sae = make(kind, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    if sae.decoder == "linear":
        sae.normalize_decoder_()
    else:
        sae.orthonormalize_decoder_()
    return sae


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(sae: SparseAutoencoder, loss: Tensor) -> dict[str, Tensor]:
    names = [name for name, _ in sae.named_parameters()]
    found = torch.autograd.grad(loss, list(sae.parameters()), materialize_grads=True)  # thresholds of codes
    return dict(zip(names, found, strict=True))


def train(sae: SparseAutoencoder, atoms: Tensor, steps: int) -> SAELoss:
    """On sums of two of the atoms, away from the origin."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(6)
    for _ in range(steps):
        chosen = torch.rand(64, len(atoms), generator=generator).topk(2, dim=1).indices
        optimizer.zero_grad()
        out = sae.loss((atoms[chosen] * (1 + torch.rand(64, 2, 1, generator=generator))).sum(dim=1))
        out.loss.backward()
        sae.after_backward_()
        optimizer.step()
        sae.after_step_()
        sae.count_firings_(out.code)
    return out


def textbook_loss(sae: SparseAutoencoder, x: Tensor, dead: Tensor | None = None) -> Tensor:
    """In dense codes, of which PyTorch takes the gradient itself."""
    spread = (x - x.mean(0)).pow(2).sum()
    if type(sae) in OPTIONS:
        code, penalty = _dense(sae, x, spread)
        levels = [x - textbook_decode(sae, code, m) - sae.b_dec for m in (*sae.prefixes, sae.num_latents)]
        residual, left = levels[-1], _left_by_topk
        loss = sum(w * e.pow(2).sum() for w, e in zip(sae.prefix_weights, levels, strict=True)) / spread
        loss = loss + penalty
    else:
        left = _left_by_pursuit if isinstance(sae, MatchingPursuitSAE) else _left_by_topk
        residual = left(sae, x)
        loss = residual.pow(2).sum() / spread
    if dead is not None:
        error = residual.detach()
        again = left(sae, x, error, dead, min(sae.aux_k, int(dead.sum())))
        loss = loss + sae.aux_weight * again.pow(2).sum() / (error - error.mean(0)).pow(2).sum()
    return loss


def _dense(sae: SparseAutoencoder, x: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """The code (N, M) of all scores, and the penalty."""
    u = (x - sae.b_dec) @ sae.W_enc.T
    norms = textbook_decode(sae, torch.eye(sae.num_latents, dtype=u.dtype)).norm(dim=1)
    z = u + sae.b_enc
    if isinstance(sae, GatedSAE):
        gates = z.relu()
        code = (z > 0) * (sae.r_mag.exp() * u + sae.b_mag).relu()
        left = x - textbook_decode(sae, gates, frozen=True) - sae.b_dec.detach()
        return code, sae.l1 * gates.sum(1).mean() + left.pow(2).sum() / spread
    if isinstance(sae, ReLUSAE):
        weighed = z.relu() * norms
        return z.relu(), sae.l1 * weighed[weighed > 0].pow(sae.p).sum() / len(x)
    raw = sae.raw_threshold.expand_as(z)
    theta = raw.exp() if sae.threshold_form == "log" else raw
    code, gate = _DenseJump.apply(z, theta, sae.bandwidth, sae.ste_to_input)
    penalty = {
        "l0": lambda: gate.sum(1).mean(),
        "quadratic": lambda: (2 / sae.target_l0 * (gate.sum(1) - sae.target_l0).pow(2)).mean(),
        "tanh": lambda: (sae.tanh_scale * code * norms).tanh().sum(1).mean(),
    }[sae.penalty]()
    below = ((theta - z).relu() * norms).sum(1).mean()
    return code, sae.penalty_weight * penalty + sae.pre_act_weight * below


class _DenseJump(torch.autograd.Function):
    """``z H(z - theta)`` and ``H(z - theta)``, with the derivatives of arXiv 2407.14435."""

    @staticmethod
    def forward(ctx, z, theta, h, ste):
        ctx.save_for_backward(z, theta)
        ctx.options = h, ste
        return z * (z > theta), (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx, d_code, d_gate):
        (z, theta), (h, ste) = ctx.saved_tensors, ctx.options
        kernel = ((z - theta).abs() / h < 0.5).to(z.dtype) / h
        d_theta = -kernel * theta * d_code - kernel * d_gate
        return (z > theta) * d_code - (d_theta if ste else 0), d_theta, None, None


def textbook_code(sae: SparseAutoencoder, x: Tensor, k: float, dead: Tensor | None = None) -> Tensor:
    """Of every token the k largest, rectified; of a batch the floor(k N) largest; or the dead ones."""
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    if dead is not None:
        pre = pre.masked_fill(~dead, -torch.inf)
    batch = isinstance(sae, BatchTopKSAE) and dead is None
    rows = pre.flatten().unsqueeze(0) if batch else pre
    keys = rows.abs() if getattr(sae, "activation", "relu") == "abs" else rows
    places = keys.topk(int(k * len(x)) if batch else k, dim=1).indices
    kept = rows.gather(1, places)
    kept = kept if keys is not rows else kept.relu()
    return torch.zeros_like(rows).scatter(1, places, kept).view_as(pre)


def textbook_decode(
    sae: SparseAutoencoder, code: Tensor, latents: int | None = None, *, frozen: bool = False
) -> Tensor:
    """Of a dense code (N, M) what the first latents of it add to ``b_dec``; ``frozen`` holds the decoder."""
    decoder = {name: part.detach() if frozen else part for name, part in sae.named_parameters()}
    a = code[:, :latents] @ decoder["W_dec"][:latents]
    if sae.decoder == "linear":
        return a
    C_1, C_2, C_3, scales = (decoder[f"polynomial.{name}"] for name in ("C_1", "C_2", "C_3", "scales"))
    _, R2, R3 = sae.ranks
    square, cube = a[:, :R2] ** 2 @ C_2.T, a[:, :R3] ** 3 @ C_3.T
    return a @ C_1.T + scales[0] * square + scales[1] * cube


def _left_by_topk(sae: SparseAutoencoder, x: Tensor, error=None, dead=None, aux_k=0) -> Tensor:
    if dead is None:
        return x - sae.b_dec - textbook_decode(sae, textbook_code(sae, x, sae.k))
    return error - textbook_decode(sae, textbook_code(sae, x, aux_k, dead))


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
