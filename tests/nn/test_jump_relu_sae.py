"""What JumpReLUSAE alone does: its penalties, its thresholds, and those that other models export to it."""

from functools import partial

import autoencoders
import pytest
import torch
from autoencoders import D, M, textbook_loss, tokens

from fastsparse.nn import BatchTopKSAE, JumpReLUSAE, TopKSAE, _stripes

make, scrambled = (partial(build, JumpReLUSAE) for build in (autoencoders.make, autoencoders.scrambled))


@pytest.mark.parametrize("dense", ["sparse", "stripes"])
@pytest.mark.parametrize(
    "options",
    [
        {"ste_to_input": True},
        {"threshold_form": "linear"},
        {"learn_threshold": False},
        {"penalty": "quadratic", "target_l0": 6.5, "ste_to_input": True},
        {"penalty": "tanh", "tanh_scale": 1.5},
        {"penalty": "tanh", "ste_to_input": True, "prefixes": (5, 20)},
        {"pre_act_weight": 0.02},
        {"pre_act_weight": 0.02, "penalty": "tanh", "threshold_form": "linear", "bandwidth": 100.0},
    ],
)
def test_loss_and_gradients_are_the_textbooks(options: dict, dense: str, monkeypatch) -> None:
    monkeypatch.setattr(_stripes, "_WIDTH", 9)
    sae = scrambled(dense=dense, **options)
    with torch.no_grad():
        sae.W_dec.mul_(1 + tokens(M, 1, dtype=torch.float64).abs())
    x = tokens(33, D, dtype=torch.float64).requires_grad_()
    out, expected = sae.loss(x), textbook_loss(sae, x)
    leaves = [x, *sae.parameters()]
    found, right = torch.autograd.grad(out.loss, leaves), torch.autograd.grad(expected, leaves)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(found, right)
    assert all(gradient.any() for gradient in right)


def test_codes_are_what_is_above_the_thresholds() -> None:
    """At its threshold a latent is off; in the band below it is no part of the code, and no firing."""
    sae = make(d_model=2, num_latents=3, bandwidth=1.0, learn_threshold=False, threshold=2.0)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    x = torch.tensor([[2.0, 1.75], [2.25, -1.0], [torch.nan, 2.5]])
    values, indices, offsets = sae.encode(x)
    assert indices.tolist() == [2, 0, 0, 1, 2]
    assert offsets.tolist() == [0, 1, 2, 5]
    nan = torch.nan
    torch.testing.assert_close(values.detach(), torch.tensor([3.75, 2.25, nan, nan, nan]), equal_nan=True)
    out = sae.loss(x[:2])
    assert out.code.indices.tolist() == [0, 1, 2, 0]
    assert out.l0 == 1
    assert out.density == 4 / 6
    sae.count_firings_(out.code)
    assert sae.tokens_since_fired.tolist() == [0, 2, 0]


def test_thresholds_begin_where_they_are_told_to_and_stay_above_zero() -> None:
    for form in ("log", "linear"):
        sae = make(threshold=0.25, threshold_form=form)
        torch.testing.assert_close(sae.threshold, torch.full((M,), 0.25))
        assert "raw_threshold" in dict(sae.named_parameters())
        with torch.no_grad():
            sae.raw_threshold -= 0.5 + tokens(M).abs()
        sae.after_step_()
        assert (sae.threshold >= 0).all()
        assert (sae.threshold < 0.25).all()
        sae.reset_parameters()
        torch.testing.assert_close(sae.threshold, torch.full((M,), 0.25))


def test_fixed_thresholds_keep_their_precision() -> None:
    sae = make(learn_threshold=False, threshold=0.1234567).to(torch.bfloat16)
    assert "raw_threshold" not in dict(sae.named_parameters())
    assert torch.equal(sae.threshold, torch.full((M,), 0.1234567))
    assert sae.W_enc.dtype == torch.bfloat16
    assert make(learn_threshold=False, threshold=0.0).threshold.eq(0).all()


def test_the_quadratic_penalty_meets_its_target() -> None:
    """With tokens that are sums of two atoms, from half of all latents down to about 3."""
    options = {"penalty": "quadratic", "target_l0": 3.0, "penalty_weight": 0.1, "dense": "auto"}
    sae = make(num_latents=30, threshold=0.05, bandwidth=0.2, **options)
    atoms = torch.nn.functional.normalize(tokens(30, D, seed=5), dim=1)
    first = autoencoders.train(sae, atoms, 1)
    last = autoencoders.train(sae, atoms, 300)
    assert first.l0 > 8
    assert 2 < last.l0 < 4
    assert last.fvu < first.fvu / 2


@pytest.mark.parametrize(("kind", "k"), [(TopKSAE, 5), (BatchTopKSAE, 4.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_of_a_tracked_threshold(kind: type, k: float, dtype: torch.dtype) -> None:
    options = {"prefixes": (7,), "prefix_weights": (0.5, 1.0), "dead_after": 5, "unit_norm": False}
    sae = kind(D, M, k, dtype=dtype, generator=torch.Generator().manual_seed(0), **options)
    with pytest.raises(RuntimeError, match=rf"^{kind.__name__}\.export_threshold: threshold must be known"):
        sae.export_threshold()
    x = tokens(40, D, dtype=dtype)
    sae.count_firings_(sae.loss(x).code)
    state = torch.get_rng_state()
    exported = sae.export_threshold()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(exported.threshold, sae.threshold.expand(M))
    assert {name: getattr(exported, name) for name in options} == options
    assert torch.equal(exported.tokens_since_fired, sae.tokens_since_fired)
    if kind is BatchTopKSAE:
        assert torch.equal(exported(x), sae.eval()(x))
        assert torch.equal(exported.encode(x).indices, sae.encode(x).indices)
    else:  # of as many as are kept, those above the mean of the least
        values, indices = sae.encode(x)
        dense = torch.zeros(40, M, dtype=dtype).scatter(1, indices, values)
        code = exported.encode(x).to_dense(M)
        clear = (dense > 0) & (dense > sae.threshold.to(dtype) * 1.02)
        assert torch.equal(code[clear], dense[clear])
    with torch.no_grad():
        exported.W_dec.zero_()
    assert sae.W_dec.any()


def test_absolute_scores_have_no_such_threshold() -> None:
    sae = TopKSAE(D, M, 5, activation="abs")
    sae.count_firings_(sae.encode(tokens(4, D)))
    with pytest.raises(ValueError, match=r"^TopKSAE\.export_threshold: activation must be 'relu', got 'abs'"):
        sae.export_threshold()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bandwidth": 0.0}, ValueError, "bandwidth must be above 0, got bandwidth=0.0"),
        ({"threshold": -0.1}, ValueError, "threshold must be finite and at least 0, got threshold=-0.1"),
        ({"threshold": 0.0}, ValueError, "threshold must be above 0, got threshold=0.0"),
        ({"penalty": "l1"}, ValueError, "penalty must be one of l0, quadratic, tanh, got 'l1'"),
        ({"penalty": "quadratic"}, TypeError, "target_l0 must be a float, got None"),
        ({"target_l0": 0.0}, ValueError, "target_l0 must be above 0, got target_l0=0.0"),
        ({"tanh_scale": 0.0}, ValueError, "tanh_scale must be above 0, got tanh_scale=0.0"),
        ({"penalty_weight": -1.0}, ValueError, "penalty_weight must be finite and at least 0, got -1.0"),
        ({"pre_act_weight": -1.0}, ValueError, "pre_act_weight must be finite and at least 0, got -1.0"),
        ({"threshold_form": "exp"}, ValueError, "threshold_form must be one of log, linear, got 'exp'"),
        ({"learn_threshold": 1}, TypeError, "learn_threshold must be a bool, got 1"),
        ({"ste_to_input": None}, TypeError, "ste_to_input must be a bool, got None"),
    ],
)
def test_refusals(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=f"^JumpReLUSAE: {message}"):
        make(**options)
