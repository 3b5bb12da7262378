"""Polynomial decoders (PolySAE) of every autoencoder that encodes by scores."""

import logging
from pathlib import Path

import pytest
import torch
from autoencoders import (
    OPTIONS,
    D,
    K,
    M,
    gradients,
    make,
    scrambled,
    textbook_code,
    textbook_decode,
    textbook_loss,
    tokens,
)
from torch import Tensor

from fastsparse import formats
from fastsparse.nn import BatchTopKSAE, GatedSAE, JumpReLUSAE, ReLUSAE, SparseAutoencoder, TopKSAE, fvu

RANKS = (10, 6, 3)
POLYNOMIAL = {"decoder": "polynomial", "ranks": RANKS}
X = tokens(33, D, dtype=torch.float64)
WAYS = [
    (kind, dense)
    for kind in (TopKSAE, BatchTopKSAE, *OPTIONS)
    for dense in (("sparse", "stripes") if kind in OPTIONS else (None,))
]


def options(dense: str | None) -> dict:
    return POLYNOMIAL | ({} if dense is None else {"dense": dense})


def columns(sae: SparseAutoencoder) -> Tensor:
    """How far from orthonormal."""
    W = sae.W_dec.detach()
    return (W.T @ W - torch.eye(W.shape[1], dtype=W.dtype)).abs().max()


def test_initial_state() -> None:
    sae = make(TopKSAE, **POLYNOMIAL)
    assert sae.W_dec.shape == (M, RANKS[0])
    assert columns(sae) < 1e-6
    atoms = textbook_decode(sae, torch.eye(M))
    torch.testing.assert_close(sae.W_enc.norm(dim=1), torch.ones(M))
    torch.testing.assert_close(sae.W_enc, atoms / atoms.norm(dim=1, keepdim=True))
    wide = make(TopKSAE, d_model=64, num_latents=512, decoder="polynomial", ranks=(64, 8, 8))
    linear = wide.W_dec @ wide.polynomial.C_1.T
    assert (linear.square().sum(1).mean() * 512 / 64 - 2).abs() < 0.2  # 2 D / M
    assert wide.polynomial.scales.tolist() == [-0.5, 0.5]
    assert "decoder='polynomial', ranks=(10, 6, 3)" in str(sae)


@pytest.mark.parametrize("prefixes", [(), (3, 17)])
@pytest.mark.parametrize(("kind", "dense"), WAYS)
def test_loss_and_gradients_are_the_textbooks(kind: type, dense: str | None, prefixes: tuple) -> None:
    weights = (0.5, 2.0, 1.5) if prefixes else (1.0,)
    sae = scrambled(kind, **options(dense), aux_k=4, dead_after=9, prefixes=prefixes, prefix_weights=weights)
    dead = torch.zeros(M, dtype=torch.bool)
    dead[::5] = True
    sae.tokens_since_fired[dead] = 9
    x = X.clone().requires_grad_()
    out = sae.loss(x)
    if kind in OPTIONS:
        expected = textbook_loss(sae, x, dead)
    else:
        code = textbook_code(sae, x, sae.k)
        levels = [textbook_decode(sae, code, m) + sae.b_dec for m in (*prefixes, M)]
        left = (x - levels[-1]).detach()
        again = textbook_decode(sae, textbook_code(sae, x, 4, dead))
        expected = sum(w * fvu(level, x) for w, level in zip(weights, levels, strict=True))
        expected = expected + sae.aux_weight * fvu(again, left)
    assert out.aux > 0
    torch.testing.assert_close(out.loss, expected)
    leaves = [x, *sae.parameters()]
    torch.testing.assert_close(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(expected, leaves))


def test_budgets_are_levels_too() -> None:
    sae = scrambled(TopKSAE, **POLYNOMIAL, budgets=(1, K, 4 * K), budget_weights=(0.5, 1, 1 / 8))
    levels = [fvu(textbook_decode(sae, textbook_code(sae, X, k)) + sae.b_dec, X) for k in sae.budgets]
    expected = 0.5 * levels[0] + levels[1] + levels[2] / 8
    out = sae.loss(X)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(gradients(sae, out.loss), gradients(sae, expected))


@pytest.mark.parametrize("options", [{"penalty": "tanh"}, {"pre_act_weight": 0.1}], ids=str)
def test_penalties_know_the_norms_of_what_latents_add(options: dict) -> None:
    for dense in ("sparse", "stripes"):
        sae = scrambled(JumpReLUSAE, **POLYNOMIAL, dense=dense, **options)
        out, expected = sae.loss(X), textbook_loss(sae, X)
        torch.testing.assert_close(out.loss, expected)
        torch.testing.assert_close(gradients(sae, out.loss), gradients(sae, expected))


@pytest.mark.parametrize(("kind", "dense"), WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, "autocast"])
def test_narrow_dtypes(kind: type, dense: str | None, dtype: torch.dtype | str) -> None:
    sae, x = make(kind, **options(dense)), tokens(64, D)
    exact = sae.loss(x).fvu
    if dtype != "autocast":
        sae, x = sae.to(dtype), x.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        out = sae.loss(x)
    out.loss.backward()
    torch.testing.assert_close(out.fvu.float(), exact, atol=0, rtol=0.01)
    for name, parameter in sae.named_parameters():
        assert parameter.grad is None or parameter.grad.dtype == parameter.dtype, name
    sae.after_step_()
    assert columns(sae) < (2e-2 if dtype == torch.bfloat16 else 1e-6)


def test_training_keeps_columns_orthonormal_and_learns_a_product() -> None:
    """Tokens are sums of two atoms and, where both are there, of a third direction as well."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
    chosen = torch.rand(4096, 2, generator=generator) < 0.5
    x = chosen.float() @ basis[:2] + chosen.all(dim=1, keepdim=True) * basis[2]
    found = {}
    for decoder in ("linear", "polynomial"):
        kind = {} if decoder == "linear" else {"decoder": decoder, "ranks": (2, 2, 2)}
        sae = make(TopKSAE, num_latents=2, k=2, aux_k=0, **kind)
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
        for _ in range(1500):
            optimizer.zero_grad()
            out = sae.loss(x[torch.randperm(len(x), generator=generator)[:256]])
            out.loss.backward()
            sae.after_backward_()
            optimizer.step()
            sae.after_step_()
        found[decoder] = float(sae.loss(x).fvu)
    assert columns(sae) < 1e-5
    assert found["polynomial"] < found["linear"] / 3


@pytest.mark.parametrize("shape", [(M, 10), (10, 10), (3000, 64)])
def test_the_retraction_is_the_q_of_qr_with_a_positive_diagonal(shape: tuple) -> None:
    sae = make(TopKSAE, d_model=shape[1], num_latents=shape[0], k=1, decoder="polynomial",
               ranks=(shape[1], 1, 1))  # fmt: skip
    with torch.no_grad():
        sae.W_dec.add_(0.3 / shape[0] ** 0.5 * tokens(*shape, seed=4))
    Q, R = torch.linalg.qr(sae.W_dec.detach().double())
    sae.orthonormalize_decoder_()
    torch.testing.assert_close(sae.W_dec.double(), Q * R.diagonal().sign(), rtol=0, atol=3e-6)
    assert columns(sae) < 2e-6


def test_columns_that_lost_their_rank(caplog: pytest.LogCaptureFixture) -> None:
    for damage in (0.0, 1e-7):
        sae = make(TopKSAE, **POLYNOMIAL)
        with torch.no_grad():
            sae.W_dec[:, 1] = sae.W_dec[:, 0] + damage * sae.W_dec[:, 1]
            sae.W_dec[:, 2] *= damage
        with caplog.at_level(logging.WARNING):
            sae.orthonormalize_decoder_()
        assert "W_dec's columns are close to dependent" in caplog.text
        assert columns(sae) < 1e-5
        caplog.clear()
    with torch.no_grad():
        sae.W_dec[3, 3] = torch.nan
    sae.orthonormalize_decoder_()
    assert not caplog.text
    assert sae.loss(tokens(5, D)).loss.isnan()


def test_interactions_are_what_is_left_of_a_pair() -> None:
    sae = scrambled(TopKSAE, **POLYNOMIAL)
    first, second = torch.tensor([0, 5, 7]), torch.tensor([1, 5, 2])
    one = torch.eye(M, dtype=torch.float64)
    alone = [textbook_decode(sae, one[latents]) for latents in (first, second)]
    together = textbook_decode(sae, one[first] + one[second])
    found = sae.pair_interactions(first, second)
    torch.testing.assert_close(found, together - sum(alone))
    assert torch.equal(found, sae.pair_interactions(second, first))
    with pytest.raises(IndexError, match=r"^TopKSAE.pair_interactions: indices.* must be in"):
        sae.pair_interactions(torch.tensor([M]), torch.tensor([0]))


@pytest.mark.parametrize("kind", [TopKSAE, BatchTopKSAE, GatedSAE])
def test_export_threshold(kind: type) -> None:
    sae = make(kind, **POLYNOMIAL)
    x = tokens(50, D)
    if kind is not GatedSAE:
        sae.count_firings_(sae.loss(x).code)
    exported = sae.export_threshold()
    assert exported.ranks == RANKS
    if kind is not TopKSAE:
        torch.testing.assert_close(exported(x), sae.eval()(x))
    torch.testing.assert_close(exported(x), textbook_decode(sae, exported.encode(x).to_dense(M)) + sae.b_dec)


@pytest.mark.parametrize("kind", [TopKSAE, ReLUSAE])
def test_saving_and_loading(tmp_path: Path, kind: type) -> None:
    sae = scrambled(kind, **POLYNOMIAL)
    sae.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    assert again.options() == sae.options()
    assert all(torch.equal(again.state_dict()[name], part) for name, part in sae.state_dict().items())
    with pytest.raises(ValueError, match=r"^save: decoder must be 'linear' in saelens, got 'polynomial'"):
        formats.save(sae, tmp_path / "other", format="saelens")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": "cubic"}, "decoder must be one of linear, polynomial, got 'cubic'"),
        ({"ranks": (3, 2, 1)}, r"ranks must be left out of a linear decoder, got \(3, 2, 1\)"),
        ({"decoder": "polynomial"}, r"ranks must be \(R1, R2, R3\) with 12 >= R1 >= R2 >= R3, .* got \(\)"),
        ({"decoder": "polynomial", "ranks": (4, 5, 1)}, r"got \(4, 5, 1\)"),
        ({"decoder": "polynomial", "ranks": (D + 1, 1, 1)}, r"got \(13, 1, 1\)"),
        ({"decoder": "polynomial", "ranks": (4, 1, 0)}, "ranks must be at least 1, got ranks=0"),
        ({"decoder": "polynomial", "ranks": (9, 1, 1), "num_latents": 8}, "with 8 >= R1"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^TopKSAE: .*{message}"):
        make(TopKSAE, **options)


def test_methods_of_the_other_decoder() -> None:
    sae = make(TopKSAE, **POLYNOMIAL)
    for method in (sae.normalize_decoder_, sae.remove_parallel_gradient_):
        with pytest.raises(ValueError, match=r"decoder must be 'linear', got 'polynomial'"):
            method()
    with pytest.raises(ValueError, match=r"orthonormalize_decoder_: decoder must be 'polynomial'"):
        make(TopKSAE).orthonormalize_decoder_()
