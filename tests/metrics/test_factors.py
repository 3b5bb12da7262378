"""Additive structure: exact data, data with an interaction, least squares against the whole matrix."""

import pytest
import torch
from oracle import random
from torch import Tensor

from fastsparse.metrics import compositionality

N, D = 300, 10


def labels() -> Tensor:
    """Three concepts of 2, 3 and 4 values, in unequal and dependent numbers."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randint(2, (N,), generator=generator)
    second = (torch.randint(3, (N,), generator=generator) * (1 + first)).clamp_max(2)
    third = torch.randint(4, (N,), generator=generator) ** 2 % 4 + torch.randint(3, (N,), generator=generator)
    return torch.stack([first, second, third.clamp_max(3)], dim=1)


def added(factors: Tensor) -> Tensor:
    parts = [random(V, D, seed=10 + c) for c, V in enumerate((2, 3, 4))]
    return 5 + sum(part[factors[:, c]] for c, part in enumerate(parts))


def test_additive_data_are_explained_whatever_the_counts():
    factors = labels()
    for whiten in (False, True):
        assert compositionality(added(factors), factors, whiten=whiten).r2 == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("whiten", [False, True])
def test_against_least_squares_on_the_whole_matrix(whiten):
    factors = labels()
    x = (added(factors) + random(N, D, seed=3)).double()
    found = compositionality(x, factors, whiten=whiten)
    centred = x - x.mean(dim=0)
    if whiten:
        U, _, _ = torch.linalg.svd(centred, full_matrices=False)
        centred = U * N**0.5
    ones = [torch.nn.functional.one_hot(factors[:, c]).double() for c in range(3)]
    design = torch.cat([torch.ones(N, 1).double(), *ones], dim=1)
    fit = design @ torch.linalg.lstsq(design, centred, driver="gelsd").solution
    assert found.r2 == pytest.approx((1 - (centred - fit).square().sum() / centred.square().sum()).item())
    if not whiten:
        again = sum(part[factors[:, c]] for c, part in enumerate(found.directions))
        torch.testing.assert_close(again, fit)
    for c, part in enumerate(found.directions):
        torch.testing.assert_close(part[factors[:, c]].mean(dim=0), part.new_zeros(part.shape[1]))


def test_an_interaction_is_left_over():
    factors = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).repeat(5, 1)
    x = torch.zeros(20, 3)
    x[:, 0] = factors[:, 0]
    x[:, 1] = (factors[:, 0] ^ factors[:, 1]).float()  # of both, and of neither alone
    assert compositionality(x, factors).r2 == pytest.approx(0.5)


def test_orthogonality_and_components():
    axes = torch.eye(5)
    factors = labels()[:, 1:]
    x = torch.stack([axes[0], axes[1], axes[2]])[factors[:, 0]] + torch.outer(factors[:, 1].float(), axes[3])
    found = compositionality(x, factors)
    assert found.across == pytest.approx(0, abs=1e-9)
    assert found.k95.tolist() == [2, 1]  # three corners span a plane, four points a line
    tilted = x + torch.outer(factors[:, 1].float(), axes[0])
    assert compositionality(tilted, factors).across > 0.1
    alone = compositionality(x, factors[:, :1])
    assert alone.across == 0
    assert alone.within > 0


@pytest.mark.parametrize(
    ("x", "factors", "why"),
    [
        (torch.rand(4, 2), torch.zeros(4, 1), "factors must be int64"),
        (torch.rand(4, 2), torch.zeros(3, 1, dtype=torch.int64), "N = 4"),
        (torch.rand(4, 2), torch.zeros(4, 0, dtype=torch.int64), "C >= 1"),
        (torch.rand(4, 2), torch.tensor([[0], [2], [0], [2]]), "every value from 0 to 2"),
        (torch.rand(4, 2), torch.tensor([[0], [-1], [0], [1]]), "every value from 0 to 1, and no others"),
        (torch.ones(4, 2), torch.zeros(4, 1, dtype=torch.int64), "x must vary"),
        (torch.full((4, 2), torch.nan), torch.zeros(4, 1, dtype=torch.int64), "x must be finite"),
        (torch.rand(0, 2), torch.zeros(0, 1, dtype=torch.int64), "at least one token"),
    ],
)
def test_refused(x, factors, why):
    with pytest.raises(ValueError, match=f"^compositionality: .*{why}"):
        compositionality(x, factors)
