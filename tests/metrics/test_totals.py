"""Sums over batches, against the dense matrix of all codes at once."""

import math

import pytest
import torch
from oracle import random

from fastsparse import Ragged, TopK, batch_topk_encode
from fastsparse.metrics import Totals, density_histogram, effective_features, evaluate
from fastsparse.nn import BatchTopKSAE, JumpReLUSAE, MatchingPursuitSAE, TopKSAE, fvu

N, D, M = 60, 8, 40


def tokens() -> torch.Tensor:
    return random(N, D, seed=1) + 3


SAES = {
    "TopK": lambda: TopKSAE(D, M, 4),
    "AbsTopK": lambda: TopKSAE(D, M, 4, activation="abs"),
    "BatchTopK": lambda: BatchTopKSAE(D, M, 4),
    "JumpReLU": lambda: JumpReLUSAE(D, M),
    "matching pursuit": lambda: MatchingPursuitSAE(D, M, 4),
}


@pytest.mark.parametrize("name", SAES)
@pytest.mark.parametrize("sizes", [[N], [1, 0, 40, 19]], ids=str)
def test_against_the_dense_matrix(name, sizes):
    torch.manual_seed(0)
    sae, x = SAES[name](), tokens()
    batches = x.split(sizes)
    found = evaluate(sae, batches)
    dense, estimates = [], []
    with torch.no_grad():
        for batch in batches:
            code = sae.encode(batch)
            estimates.append(sae.decode(code).reshape(batch.shape))
            ragged = code.code if hasattr(code, "code") else code
            ragged = ragged if isinstance(ragged, Ragged) else TopK(ragged.values, ragged.indices)
            dense.append(ragged.to_dense(M))
    f = torch.cat(dense).double()
    assert found.num_tokens == N
    assert found.l0 == pytest.approx((f != 0).sum().item() / N)
    assert found.fvu == pytest.approx(fvu(torch.cat(estimates), x).item(), rel=1e-5)
    torch.testing.assert_close(found.density, (f != 0).double().mean(dim=0))
    assert found.num_dead == int((f == 0).all(dim=0).sum())
    p = f.abs().sum(dim=0) / f.abs().sum()
    assert found.effective_features == pytest.approx(math.exp(-torch.special.xlogy(p, p).sum()))
    assert found.superposition == pytest.approx(found.effective_features / D)


def test_effective_features():
    assert effective_features(torch.ones(8)) == pytest.approx(8)  # equal ones
    assert effective_features(torch.tensor([0.0, 5.0, 0.0])) == 1
    assert effective_features(torch.zeros(3)) == 0
    assert effective_features(torch.tensor([1e-30, 1e-30])) == pytest.approx(2)
    for mass in (torch.tensor([-1.0]), torch.tensor([torch.nan]), torch.tensor([torch.inf])):
        with pytest.raises(ValueError, match="mass must be finite and at least 0"):
            effective_features(mass)
    with pytest.raises(ValueError, match=r"shape \(M,\), got shape \(2, 2\)"):
        effective_features(torch.ones(2, 2))


def test_far_from_zero_the_variance_is_about_the_mean():
    x = random(N, D, seed=1).double() + 1e6
    totals = Totals(M)
    for batch in x.split(7):
        code = TopK(torch.ones(len(batch), 1), torch.zeros(len(batch), 1, dtype=torch.int64))
        totals.add_(code, batch, batch + 0.5)
    expected = 0.25 * N * D / (x - x.mean(dim=0)).square().sum().item()
    assert totals.measures().fvu == pytest.approx(expected, rel=1e-6)


def test_tokens_without_variance_are_compared_with_zero():
    totals, ones = Totals(M), torch.ones(3, D)
    totals.add_(TopK(torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int64)), ones, 0.5 * ones)
    assert totals.measures().fvu == pytest.approx(0.25)
    assert fvu(0.5 * ones, ones).item() == pytest.approx(0.25)


def test_a_whole_batch_is_a_code_too():
    code = batch_topk_encode(random(N, D, seed=1), random(M, D, seed=2), total=100)
    totals = Totals(M)
    totals.add_(code)
    found = totals.measures()
    assert (found.fvu, found.superposition) == (None, None)
    assert found.l0 == pytest.approx((code.values != 0).sum().item() / N)


def test_density_histogram():
    density = torch.tensor([0.0, 1e-4, 2e-3, 0.1, 0.3, 1.0, 1.0])
    edges, counts = density_histogram(density, per_decade=2)
    assert counts.sum() == 6
    expected = torch.histogram(density[1:].double().log10(), bins=edges.log10())[0]
    assert counts.tolist() == expected.long().tolist()
    assert density_histogram(torch.zeros(3))[1].sum() == 0
    assert density_histogram(torch.ones(3))[1].tolist() == [3]
    with pytest.raises(ValueError, match=r"density must be in \[0, 1\]"):
        density_histogram(torch.tensor([1.5]))


def test_refused():
    code = TopK(torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one token, got none"):
        Totals(M).measures()
    with pytest.raises(TypeError, match="code must be a TopK, Ragged, BatchTopK or Pursuit, got Tensor"):
        Totals(M).add_(torch.ones(3))
    with pytest.raises(IndexError, match=r"must be in \[0, 1\)"):
        Totals(1).add_(TopK(code.values, code.indices + 1))
    with pytest.raises(ValueError, match="given together"):
        Totals(M).add_(code, torch.ones(3, D))
    with pytest.raises(ValueError, match="x must hold the 3 tokens of code"):
        Totals(M).add_(code, torch.ones(2, D), torch.ones(2, D))
    totals = Totals(M)
    totals.add_(code)
    with pytest.raises(ValueError, match="with every batch, or with none"):
        totals.add_(code, torch.ones(3, D), torch.ones(3, D))
