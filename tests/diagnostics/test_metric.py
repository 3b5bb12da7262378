"""The atomic inner product: its definition, what leaves it alone, and moments that can't be inverted."""

import pytest
import torch
from oracle import random

from fastsparse.diagnostics import atomic_cosine, atomic_metric

N, D = 200, 6


def skewed(*, seed: int = 1) -> torch.Tensor:
    return (random(N, D, seed=seed) @ random(D, D, seed=9) + 0.5).double()


def test_it_inverts_the_moment_about_zero():
    x = skewed()
    moment = x.T @ x / N
    torch.testing.assert_close(atomic_metric(x) @ moment, torch.eye(D, dtype=torch.float64))
    assert torch.allclose((x @ atomic_metric(x) * x).sum(dim=1).mean(), torch.tensor(float(D)).double())


def test_batches_are_added_up():
    x = skewed().float()
    torch.testing.assert_close(atomic_metric(iter(x.split([3, 150, 47]))), atomic_metric(x))


def test_a_linear_map_of_the_data_changes_no_angle():
    x, A, u, v = skewed(), random(D, D, seed=3).double(), random(4, D, seed=4), random(4, D, seed=5)
    before = atomic_cosine(u, v, atomic_metric(x))
    after = atomic_cosine(u.double() @ A.T, v.double() @ A.T, atomic_metric(x @ A.T))
    torch.testing.assert_close(before.double(), after, rtol=1e-5, atol=1e-6)


def test_without_a_metric_it_is_the_cosine():
    u, v = random(4, 1, D, seed=4), random(3, D, seed=5)
    torch.testing.assert_close(atomic_cosine(u, v), torch.cosine_similarity(u, v, dim=-1))
    assert atomic_cosine(u, 0 * v).eq(0).all()
    assert atomic_cosine(1e30 * u, 1e-30 * v).isfinite().all()


def test_a_singular_moment_is_told_and_its_pseudo_inverse_taken():
    x = torch.tensor([[1.0, 0.0, 1.0], [0.0, 2.0, 0.0]])
    with pytest.warns(UserWarning, match=r"full rank \(3\) to be inverted, it has 2"):
        metric = atomic_metric(x)
    torch.testing.assert_close(metric, torch.linalg.pinv(x.double().T @ x.double() / 2))
    nowhere = torch.tensor([1.0, 0.0, -1.0])  # no data are there
    assert atomic_cosine(nowhere, nowhere, metric) == 0
    torch.testing.assert_close(
        atomic_cosine(torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 3.0]), metric), torch.tensor(1.0)
    )


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (torch.zeros(0, 3), "at least one token"),
        (iter([]), "at least one token"),
        (iter([torch.zeros(2, 3), torch.zeros(2, 4)]), r"\(\.\.\., D\) with D = 3"),
        (torch.tensor([[torch.nan, 1.0]]), "must be finite"),
        (torch.zeros(3), r"\(M, D\)"),
    ],
)
def test_refused(x, why):
    with pytest.raises(ValueError, match=f"^atomic_metric: .*{why}"):
        atomic_metric(x)


@pytest.mark.parametrize(
    ("metric", "why"),
    [
        (torch.eye(3), r"\(D, D\) = \(2, 2\)"),
        (torch.tensor([[1.0, 1.0], [0.0, 1.0]]), "symmetric"),
        (torch.diag(torch.tensor([1.0, -1.0])), "no negative eigenvalue"),
    ],
)
def test_refused_metrics(metric, why):
    with pytest.raises(ValueError, match=f"^atomic_cosine: metric must .*{why}"):
        atomic_cosine(torch.ones(2), torch.ones(2), metric)
