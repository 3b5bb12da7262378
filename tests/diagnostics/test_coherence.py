"""Coherence and what follows from it, against all pairs, and on a dictionary whose answers are known."""

import pytest
import torch
from oracle import random
from torch import Tensor

from fastsparse import sparse_decode, threshold_encode
from fastsparse.diagnostics import (
    atomic_cosine,
    atomic_metric,
    coherence,
    largest_unique_support,
    restricted_isometry,
    uniqueness_fraction,
)


def spikes_and_walsh() -> Tensor:
    """(128, 64): the unit vectors, and the rows of the Hadamard matrix over 8. They cross at 1/8."""
    hadamard = torch.ones(1, 1)
    while len(hadamard) < 64:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    return torch.cat([torch.eye(64), hadamard / 8])


def test_a_known_dictionary():
    found = coherence(spikes_and_walsh())
    assert found.per_atom.eq(1 / 8).all()
    assert found.mutual == 1 / 8
    assert found.num_zero == 0
    assert ((found.nearest < 64) != (torch.arange(128) < 64)).all()
    assert largest_unique_support(found.mutual).item() == 4
    isometry = restricted_isometry(spikes_and_walsh(), 4, generator=torch.Generator().manual_seed(1))
    assert 0.24 < isometry.sampled < isometry.bound == 0.375
    # 8 spikes, spaced by 8, make the same as 8 Walsh functions: K = 8 isn't unique.
    spikes = torch.zeros(64)
    spikes[::8] = 1
    as_walsh = spikes_and_walsh()[64:] @ spikes
    assert (as_walsh.abs() > 1e-6).sum() == 8


def test_a_threshold_finds_every_support_of_two():
    """4,000 codes of two atoms, values in [1, 2]: their products exceed all others, and a threshold."""
    atoms, generator = spikes_and_walsh(), torch.Generator().manual_seed(2)
    indices = torch.stack([torch.randperm(128, generator=generator)[:2] for _ in range(4000)])
    values = 1 + torch.rand(4000, 2, generator=generator)
    x = sparse_decode(values, indices, atoms)
    code = threshold_encode(x, atoms, threshold=0.625)
    assert code.row_counts().eq(2).all()
    assert torch.equal(code.indices.view(4000, 2), indices.sort(dim=1).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("under", ["the usual product", "a metric"])
def test_against_all_pairs(dtype, under):
    atoms = (random(70, 8, seed=1) * torch.logspace(-3, 3, 70).unsqueeze(1)).to(dtype)
    metric = atomic_metric(random(300, 8, seed=2) @ random(8, 8, seed=3)) if under == "a metric" else None
    wide = atoms.double()
    pairs = atomic_cosine(wide.unsqueeze(1), wide, metric).abs().fill_diagonal_(0)
    found = coherence(atoms, metric)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found.per_atom.double(), pairs.amax(dim=1), rtol=0, atol=tolerance)
    torch.testing.assert_close(
        pairs.gather(1, found.nearest.unsqueeze(1)).squeeze(1), pairs.amax(dim=1), rtol=0, atol=tolerance
    )


def test_copies_and_zeros():
    atoms = random(9, 8, seed=1)
    atoms[3] = atoms[5] = -2 * atoms[1]
    atoms[7] = 0
    found = coherence(atoms)
    assert found.per_atom[[1, 3, 5, 7]].tolist() == pytest.approx([1, 1, 1, 1], abs=1e-6)
    assert found.num_zero == 1
    assert found.nearest[7] == -1
    assert all(int(found.nearest[m]) in {1, 3, 5} - {m} for m in (1, 3, 5))
    assert found.per_atom[[0, 2, 4, 6, 8]].max() < 0.99
    alone = coherence(atoms[:1])
    assert (alone.per_atom.item(), alone.nearest.item(), alone.mutual.item()) == (0, -1, 0)


def test_largest_unique_support():
    assert largest_unique_support(1) == 0
    assert largest_unique_support(0.5) == 1
    assert largest_unique_support(0.0) == 2**63 - 1
    assert largest_unique_support(torch.tensor([1.0, 0.25, 0.0])).tolist() == [0, 2, 2**63 - 1]
    for mu in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"mu must be in \[0, 1\]"):
            largest_unique_support(mu)


def by_quantiles(mu: Tensor, counts: Tensor) -> float:
    """The largest q of those at which a quantile changes that the definition allows."""
    mu, counts = mu.sort().values, counts.sort().values
    allowed = [0.0]
    for i in range(1, len(mu) * len(counts) + 1):
        q = i / (len(mu) * len(counts))
        if mu[-(-i // len(counts)) - 1] * (2 * counts[-(-i // len(mu)) - 1] - 1) < 1:
            allowed.append(q)
    return max(allowed)


def test_uniqueness_fraction():
    assert uniqueness_fraction(torch.full((3,), 0.2), torch.tensor([1, 2, 2])) == 1
    assert uniqueness_fraction(torch.ones(3), torch.tensor([1, 2])) == 0
    assert uniqueness_fraction(torch.ones(2), torch.tensor([0, 0, 5, 5])) == 0.5  # no latents: unique
    mu, counts = torch.linspace(0, 1, 8).double(), torch.arange(16) // 4
    assert uniqueness_fraction(mu, counts) == by_quantiles(mu, counts)


@pytest.mark.parametrize(
    ("per_atom", "counts", "kind", "why"),
    [
        (torch.rand(3), torch.rand(3), TypeError, "row_counts must be"),
        (torch.rand(3), torch.ones(3, 1, dtype=torch.int64), TypeError, "row_counts must be"),
        (torch.rand(0), torch.ones(3, dtype=torch.int64), ValueError, "M=0 and N=3"),
        (torch.rand(3), torch.ones(0, dtype=torch.int64), ValueError, "M=3 and N=0"),
        (torch.rand(3) + 1, torch.ones(3, dtype=torch.int64), ValueError, r"per_atom must be in \[0, 1\]"),
        (torch.rand(3), -torch.ones(3, dtype=torch.int64), ValueError, "at least 0, got -1"),
    ],
)
def test_refused_quantiles(per_atom, counts, kind, why):
    with pytest.raises(kind, match=f"^uniqueness_fraction: .*{why}"):
        uniqueness_fraction(per_atom, counts)


def test_isometry_is_between_what_is_found_and_what_coherence_allows():
    atoms = random(40, 16, seed=1)
    found = restricted_isometry(atoms, 3, samples=500, generator=torch.Generator().manual_seed(3))
    assert 0 < found.sampled <= found.bound
    assert restricted_isometry(atoms, 1, samples=5).sampled == pytest.approx(0, abs=1e-6)
    pairs = restricted_isometry(atoms[:2], 2, samples=3)  # all there are
    assert pairs.sampled == pytest.approx(pairs.bound, abs=1e-6)


def test_refused_atoms():
    with pytest.raises(ValueError, match="coherence: atoms must hold at least one"):
        coherence(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="coherence: atoms must be finite"):
        coherence(torch.tensor([[torch.inf, 1.0]]))
    with pytest.raises(ValueError, match=r"restricted_isometry: atoms must have none of norm 0, got 2"):
        restricted_isometry(torch.zeros(2, 3), 1)
    with pytest.raises(ValueError, match=r"K must be at most the number of atoms \(2\), got K=3"):
        restricted_isometry(torch.eye(2), 3)
