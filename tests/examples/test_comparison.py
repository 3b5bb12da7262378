"""The comparison with dense PyTorch: it checks before it times, and it leaves the SAE alone."""

import re

import pytest
import torch

from examples.demo import comparison
from examples.demo.comparison import Comparison, compare, dense_loss, panel, sparse_loss, step_bars
from fastsparse.nn import TopKSAE


@pytest.fixture
def sae() -> TopKSAE:
    torch.manual_seed(0)
    return TopKSAE(16, 64, 4)


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randn(200, 16, generator=torch.Generator().manual_seed(1))


def test_dense_and_sparse_agree_to_rounding_in_fp64(sae, rows):
    sae, rows = sae.double(), rows.double()
    gradients = []
    for loss in (dense_loss, sparse_loss):
        sae.zero_grad()
        value = loss(sae, rows)
        value.backward()
        gradients.append([value.detach(), *(parameter.grad.clone() for parameter in sae.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_compare_times_both_and_changes_nothing(sae, rows):
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    result = compare(sae, rows, batch=50, rounds=3, lr=1e-3)
    assert len(result.fastsparse) == len(result.dense) == 3
    assert min(*result.fastsparse, *result.dense) > 0
    assert result.loss_error <= 1e-5
    assert result.gradient_error <= 1e-3
    assert all(torch.equal(before[name], tensor) for name, tensor in sae.state_dict().items())
    assert all(parameter.grad is None for parameter in sae.parameters())


@pytest.mark.parametrize(
    "wrong", [lambda loss: loss * 1.01, lambda loss: loss + (loss - loss.detach()) * 0.1]
)
def test_compare_refuses_a_wrong_answer(sae, rows, monkeypatch, wrong):
    right = comparison.dense_loss
    monkeypatch.setattr(comparison, "dense_loss", lambda sae, x: wrong(right(sae, x)))
    with pytest.raises(RuntimeError, match="disagree"):
        compare(sae, rows, batch=50, rounds=1, lr=1e-3)


def test_compare_refuses_nan(sae, rows):
    with torch.no_grad():
        sae.W_enc[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="disagree"):
        compare(sae, rows, batch=50, rounds=1, lr=1e-3)


def test_speedup_is_the_ratio_of_medians():
    assert Comparison([1.0, 2.0, 9.0], [1.0, 6.0, 7.0], 0.0, 0.0).speedup == 3


def test_the_panel_says_what_was_measured():
    made = panel(Comparison([0.01, 0.02, 0.03], [0.08, 0.1, 0.12], 1e-7, 0.0), batch=100)
    assert made.tile[0].startswith("5.0")
    assert "20.0 ms, dense 100 ms, medians of 3" in made.tile[2]
    assert "losses differ by 1e-07, the gradients by nothing" in made.caption


def test_bars_are_in_proportion():
    widths = re.findall(
        r'<rect class="bar[^"]*" x="0" y="\d+" width="([\d.]+)"', step_bars([("a", [1] * 4), ("b", [4] * 4)])
    )
    assert float(widths[1]) == pytest.approx(4 * float(widths[0]), rel=1e-2)
