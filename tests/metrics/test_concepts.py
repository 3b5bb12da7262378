"""Separability and posteriors, against plain loops, and where the answer is known."""

import math

import pytest
import torch
from oracle import random

from fastsparse import Ragged, TopK, threshold_encode
from fastsparse.metrics import attenuate, concept_histograms, concept_posterior, concept_separability

N, M, C, BINS = 400, 12, 3, 5


def example() -> tuple[Ragged, torch.Tensor]:
    """Concepts shift some directions, so that some latents speak of them."""
    labels = torch.arange(N) % 7 % C
    x = random(N, 6, seed=1) + 1.5 * torch.eye(C, 6)[labels]
    return threshold_encode(x, random(M, 6, seed=2), threshold=0.5), labels


def binned(value: float, values: list[float]) -> int:
    if value == 0:
        return 0
    low, high = min(values), max(values)
    return 1 + min(BINS - 1, math.floor((value - low) / ((high - low) / BINS))) if high > low else 1


def test_against_loops():
    code, labels = example()
    dense = code.to_dense(M).double()
    found = concept_histograms(code, labels, M, bins=BINS)
    scores = concept_separability(found)
    tokens = [int((labels == c).sum()) for c in range(C)]
    for m in range(M):
        column = dense[:, m].tolist()
        values = [value for value in column if value != 0]
        shares = [[0.0] * (BINS + 1) for _ in range(C)]
        for value, label in zip(column, labels.tolist(), strict=True):
            shares[label][binned(value, values)] += 1 / tokens[label]
        torch.testing.assert_close(found.shares[m], torch.tensor(shares).double())

        def entropy(shares: list[float]) -> float:
            return -sum(p * math.log2(p) for p in shares if p > 0)

        weights = [count / N for count in tokens]
        together = [sum(w * p[b] for w, p in zip(weights, shares, strict=True)) for b in range(BINS + 1)]
        apart = entropy(together) - sum(w * entropy(p) for w, p in zip(weights, shares, strict=True))
        assert scores[m].item() == pytest.approx(math.sqrt(apart / entropy(weights)), abs=1e-6)
    posterior = concept_posterior(found, code)
    for e in range(0, len(code.values), 37):
        m, value = int(code.indices[e]), code.values[e].item()
        values = [v for v in dense[:, m].tolist() if v != 0]
        joint = [w * found.shares[m, c, binned(value, values)].item() for c, w in enumerate(weights)]
        assert posterior[e].tolist() == pytest.approx([p / sum(joint) for p in joint])


def test_equal_concepts_are_not_told_apart_and_disjoint_ones_are():
    values = torch.tensor([[1.0, 1.0, 3.0], [1.0, 1.0, 4.0], [1.0, 5.0, 0.0], [1.0, 6.0, 0.0]])
    code = TopK(values, torch.arange(3).expand(4, 3))
    labels = torch.tensor([0, 0, 1, 1])
    found = concept_histograms(code, labels, 4, bins=2)
    assert concept_separability(found).tolist() == pytest.approx([0, 1, 1, 0])
    assert concept_separability(concept_histograms(code, labels, 4, weights=torch.tensor([0.9, 0.1])))[1] == 1
    masked = attenuate(found, code, 1)
    assert torch.equal(masked.values[:, 0], values[:, 0] / 2)  # says nothing: the weight of the other
    assert torch.equal(masked.values[:, 1], torch.tensor([1.0, 1.0, 0.0, 0.0]))  # masked where it is certain
    assert torch.equal(masked.values[:, 2], values[:, 2])
    assert torch.equal(masked.indices, code.indices)


def test_attenuation_keeps_the_kind_of_code_and_its_gradient():
    code, labels = example()
    found = concept_histograms(code, labels, M)
    values = code.values.clone().requires_grad_()
    weaker = attenuate(found, code._replace(values=values), 0)
    assert isinstance(weaker, Ragged)
    weaker.values.sum().backward()
    torch.testing.assert_close(values.grad, 1 - concept_posterior(found, code)[:, 0].float())
    assert ((weaker.values <= code.values) & (weaker.values >= 0)).all()


@pytest.mark.parametrize(
    ("change", "kind", "why"),
    [
        (
            {"labels": torch.zeros(N, dtype=torch.int64)},
            ValueError,
            "at least 2 concepts",
        ),
        ({"labels": torch.zeros(N)}, ValueError, "labels must be int64"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"shape \(N,\) = \(400,\)"),
        ({"labels": torch.arange(N) % 3 - 1}, ValueError, r"labels must be in \[0, 2\), got -1 to 1"),
        ({"num_concepts": 4}, ValueError, "every concept must have a token, got none of 3"),
        ({"weights": torch.tensor([1.0, 0.0, 1.0])}, ValueError, "weights must be finite and above 0"),
        ({"weights": torch.ones(2)}, ValueError, r"shape \(C,\) = \(3,\)"),
        ({"bins": 0}, ValueError, "bins must be at least 1"),
    ],
)
def test_refused(change, kind, why):
    code, labels = example()
    with pytest.raises(kind, match=f"^concept_histograms: .*{why}"):
        concept_histograms(code, **({"labels": labels, "num_latents": M} | change))
    with pytest.raises(ValueError, match=r"concept must be below their number \(3\), got concept=3"):
        attenuate(concept_histograms(code, labels, M), code, 3)
