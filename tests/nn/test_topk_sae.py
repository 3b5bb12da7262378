"""What TopKSAE alone does, and the life of its latents."""

from functools import partial

import autoencoders
import pytest
import torch
from autoencoders import D, K, M, tokens

import fastsparse
from fastsparse.nn import TopKSAE, fvu

make = partial(autoencoders.make, TopKSAE)


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


@pytest.mark.parametrize("options", [{"groups": 4, "k": 2}, {"activation": "abs"}])
def test_variants_are_the_textbooks(options: dict) -> None:
    sae = autoencoders.scrambled(TopKSAE, **options)
    x = tokens(33, D, dtype=torch.float64)
    pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).unflatten(1, (sae.groups, -1))
    keys = pre.abs() if sae.activation == "abs" else pre
    kept = torch.zeros_like(pre).scatter(2, keys.topk(sae.k).indices, 1.0) * pre
    dense = (kept if sae.activation == "abs" else kept.relu()).flatten(1)
    expected = dense @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(sae(x), expected)
    found, right = sae.loss(x).loss, fvu(expected, x)
    torch.testing.assert_close(autoencoders.gradients(sae, found), autoencoders.gradients(sae, right))


def test_the_threshold_follows_the_least_positive_values() -> None:
    """Of tokens that have one; the first step sets it, later ones move it."""
    sae = make(threshold_decay=0.75)
    code = fastsparse.TopK(torch.tensor([[3.0, 2.0], [1.0, 0.0], [0.0, 0.0]]), torch.zeros(3, 2).long())
    sae.count_firings_(code)
    assert sae.threshold == 1.5
    sae.count_firings_(code._replace(values=code.values * 3))
    assert sae.threshold == 1.5 + 0.25 * 3
    sae.count_firings_(code._replace(values=-code.values.abs() * 0))
    assert sae.threshold == 2.25
    assert sae.to(torch.bfloat16).threshold.dtype == torch.float32
    sae.reset_parameters()
    assert sae.threshold == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 3}, r"groups must divide num_latents \(40\), got groups=3"),
        ({"groups": 20}, r"k must be at most num_latents / groups \(2\), got k=5"),
        ({"activation": "none"}, "activation must be one of relu, abs, got 'none'"),
        ({"budgets": (2, 9)}, r"budgets must hold k \(5\), .*got budgets=\(2, 9\)"),
        ({"budgets": (5, 9), "prefixes": (3,)}, r"budgets must .* neither prefixes .*prefixes=\(3,\)"),
        ({"budgets": (5, 41)}, r"budgets must ascend and be at most 40, got \(5, 41\)"),
        ({"budgets": (5, 9), "budget_weights": (1,)}, "budget_weights must be 2 numbers, got 1"),
        ({"prefixes": (9, 9)}, r"prefixes must ascend and be at most 39, got \(9, 9\)"),
        ({"prefixes": (40,)}, r"prefixes must ascend and be at most 39, got \(40,\)"),
        ({"prefixes": (0, 4)}, "prefixes must be at least 1, got prefixes=0"),
        (
            {"prefixes": (4,), "prefix_weights": (1, -1)},
            "prefix_weights must be finite and at least 0, got -1",
        ),
        ({"threshold_decay": 1.0}, "threshold_decay must be below 1, got 1.0"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^TopKSAE: {message}"):
        TopKSAE(D, M, K, **options)
