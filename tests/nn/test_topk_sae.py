"""TopKSAE against a dense textbook autoencoder, and the life of its latents."""

from functools import partial

import autoencoders
import pytest
import torch
import torch.nn.functional as F
from autoencoders import D, M, gradients, tokens

import fastsparse
from fastsparse.nn import TopKSAE

make, scrambled = (partial(build, TopKSAE) for build in (autoencoders.make, autoencoders.scrambled))


def dense_code(pre: torch.Tensor, k: int) -> torch.Tensor:
    """(N, M): the k largest of every row, rectified, everything else 0."""
    top = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())


def textbook_loss(sae: TopKSAE, x: torch.Tensor, dead: torch.Tensor | None = None) -> torch.Tensor:
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    reconstruction = dense_code(pre, sae.k) @ sae.W_dec + sae.b_dec
    loss = (x - reconstruction).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    if dead is not None:
        error = (x - reconstruction).detach()
        code = dense_code(pre.masked_fill(~dead, -torch.inf), min(sae.aux_k, int(dead.sum())))
        again = (error - code @ sae.W_dec).pow(2).sum() / (error - error.mean(0)).pow(2).sum()
        loss = loss + sae.aux_weight * again
    return loss


@pytest.mark.parametrize("num_dead", [0, 3, 20])
def test_loss_and_gradients_are_the_textbooks(num_dead: int) -> None:
    sae = scrambled(aux_k=8, dead_after=100)
    dead = torch.zeros(M, dtype=torch.bool)
    dead[torch.randperm(M, generator=torch.Generator().manual_seed(3))[:num_dead]] = True
    sae.tokens_since_fired[dead] = 100
    x = tokens(33, D, dtype=torch.float64)
    out = sae.loss(x)
    expected = textbook_loss(sae, x, dead if num_dead else None)
    torch.testing.assert_close(out.loss, expected)
    assert out.num_dead == num_dead
    assert (out.aux > 0) == (num_dead > 0)
    torch.testing.assert_close(out.fvu, textbook_loss(sae, x))
    torch.testing.assert_close(gradients(sae, out.loss), gradients(sae, expected))


def test_gradient_to_the_input_is_the_textbooks() -> None:
    sae = scrambled()
    x = tokens(9, D, dtype=torch.float64).requires_grad_()
    (ours,) = torch.autograd.grad(sae.loss(x).loss, x)
    (expected,) = torch.autograd.grad(textbook_loss(sae, x), x)
    torch.testing.assert_close(ours, expected)


def test_initial_state() -> None:
    sae = make()
    assert isinstance(sae.encode(tokens(2, D)), fastsparse.TopK)
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert not sae.b_enc.any()


@pytest.mark.parametrize(
    ("d_model", "aux_k"), [(1, 1), (2, 1), (384, 256), (512, 256), (768, 512), (4096, 2048)]
)
def test_default_aux_k_is_the_power_of_two_nearest_half_the_width(d_model: int, aux_k: int) -> None:
    # log2(384 / 2) = 7.58 is nearer to 8 than to 7.
    assert TopKSAE(d_model, 4, 1).aux_k == aux_k


def test_counters_count_tokens_since_a_positive_value() -> None:
    sae = make(d_model=3, num_latents=3, k=2)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3))
    x = torch.tensor([[2.0, 1.0, -1.0], [3.0, -1.0, -2.0]])  # the second token's runner-up is rectified to 0
    sae.count_firings_(sae.encode(x))
    assert sae.tokens_since_fired.tolist() == [0, 0, 2]
    sae.count_firings_(sae.encode(x[1:]))
    assert sae.tokens_since_fired.tolist() == [0, 1, 3]
    assert sae.loss(x).l0 == 1.5


def test_dead_latents_are_revived_by_the_auxiliary_loss() -> None:
    """A third of the latents is pushed down: positive at times, but never among the k largest."""

    def train(aux_weight: float) -> int:
        sae = make(num_latents=30, k=2, aux_weight=aux_weight, aux_k=4, dead_after=600)
        with torch.no_grad():
            sae.b_enc[:10] = -0.8
        atoms = F.normalize(tokens(30, D, seed=5), dim=1)
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(6)
        for _ in range(150):
            chosen = torch.rand(64, 30, generator=generator).topk(2, dim=1).indices
            x = atoms[chosen].sum(dim=1)
            optimizer.zero_grad()
            out = sae.loss(x)
            out.loss.backward()
            sae.remove_parallel_gradient_()
            optimizer.step()
            sae.normalize_decoder_()
            sae.count_firings_(out.code)
        return int(sae.dead[:10].sum())

    assert train(aux_weight=0.0) >= 8
    assert train(aux_weight=1 / 32) <= 2


def test_perfect_reconstruction_with_dead_latents_is_finite() -> None:
    sae = make(d_model=3, num_latents=5, k=2, dead_after=1)
    with torch.no_grad():
        sae.W_enc[:3] = sae.W_dec[:3] = torch.eye(3)
    sae.tokens_since_fired[3:] = 1
    out = sae.loss(torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
    assert out.num_dead == 2
    out.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in sae.parameters())


def test_more_active_latents_than_latents_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^TopKSAE: k must be at most num_latents \(8\), got k=9"):
        TopKSAE(4, 8, 9)
