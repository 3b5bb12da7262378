"""SAELens with our ops beneath it: what it computes and trains is what it does without, to rounding."""

import copy
import io
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from alike import EXACT, SINGLE, STEPS, assert_alike, changed_by
from torch import Tensor, nn

import fastsparse.compat
from fastsparse.codes import code_of, preactivations
from fastsparse.codes.preactivations import Preactivations
from fastsparse.compat import sae_lens as adapter

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed", exc_type=ImportError)
    import sae_lens.saes.abstopk_sae as abstopk_sae
    import sae_lens.saes.matryoshka_batchtopk_sae as matryoshka
    import sae_lens.saes.topk_sae as topk_sae
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import TrainStepInput

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

D, M, N, K = 12, 96, 40, 5
FLOATS = {"float32": 1e-5, "float64": 1e-11}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Nothing is patched, before or after."""
    assert not adapter.status().applied
    yield
    adapter.undo()


@pytest.fixture
def dense_codes(monkeypatch):
    """Encoders with thresholds are served however many latents are active."""
    monkeypatch.setattr(adapter, "DENSEST", 1.0)


def served(*, least_work: int = 0, **options):
    return adapter.apply(least_work=least_work, **options)


def counts() -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    status = adapter.status()
    return (
        {site.removeprefix("sae_lens.saes."): n for site, n in status.served.items()},
        {(site.removeprefix("sae_lens.saes."), why): n for (site, why), n in status.refused.items()},
    )


class Counted:
    """What was served and refused within a block."""

    def __enter__(self) -> "Counted":
        self.before = counts()
        return self

    def __exit__(self, *_) -> None:
        self.served, self.refused = (
            {key: n - then.get(key, 0) for key, n in now.items() if n > then.get(key, 0)}
            for now, then in zip(counts(), self.before, strict=True)
        )


TRAINED = {
    "topk": (sae_lens.TopKTrainingSAE, sae_lens.TopKTrainingSAEConfig, {"k": K}),
    "sparse": (
        sae_lens.TopKTrainingSAE,
        sae_lens.TopKTrainingSAEConfig,
        {"k": K, "use_sparse_activations": True},
    ),
    "abstopk": (sae_lens.AbsTopKTrainingSAE, sae_lens.AbsTopKTrainingSAEConfig, {"k": K}),
    "batchtopk": (sae_lens.BatchTopKTrainingSAE, sae_lens.BatchTopKTrainingSAEConfig, {"k": K - 0.3}),
    "matryoshka": (
        sae_lens.MatryoshkaBatchTopKTrainingSAE,
        sae_lens.MatryoshkaBatchTopKTrainingSAEConfig,
        {"k": K, "matryoshka_widths": [17, 40, M]},
    ),
    "matryoshka_aux": (
        sae_lens.MatryoshkaBatchTopKTrainingSAE,
        sae_lens.MatryoshkaBatchTopKTrainingSAEConfig,
        {"k": K, "matryoshka_widths": [33, M], "use_matryoshka_aux_loss": True},
    ),
}
JUMPS = {
    "step": {},
    "quadratic": {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 4.0},
    "tanh": {"jumprelu_sparsity_loss_mode": "tanh"},
    "anthropic": {
        "jumprelu_sparsity_loss_mode": "tanh",
        "jumprelu_ste_to_input": True,
        "pre_act_loss_coefficient": 0.03,
    },
    "step_to_input": {"jumprelu_ste_to_input": True, "pre_act_loss_coefficient": 0.1},
}


def trained(name: str, dtype: str = "float32", **options) -> nn.Module:
    """An SAE whose parameters are nothing special, atoms of any norm among them."""
    made, config, defaults = TRAINED[name]
    return scattered(made(config(d_in=D, d_sae=M, dtype=dtype, **copy.deepcopy(defaults | options))))


def jumping(name: str, dtype: str = "float32", **options) -> nn.Module:
    options = {"jumprelu_bandwidth": 0.2, "jumprelu_init_threshold": 0.3} | JUMPS[name] | options
    config = sae_lens.JumpReLUTrainingSAEConfig(d_in=D, d_sae=M, dtype=dtype, **options)
    sae = scattered(sae_lens.JumpReLUTrainingSAE(config))
    sae.threshold.data += 0.2 * torch.rand(M)
    return sae


def scattered(sae: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name != "threshold":
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        sae.W_dec.mul_(torch.rand(sae.W_dec.shape[0], 1, dtype=sae.W_dec.dtype) + 0.5)
    return sae


def tokens(*leading: int, dtype: str = "float32", seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(leading or (N,)), D, generator=generator).to(getattr(torch, dtype))


def stepped(sae: nn.Module, x: Tensor, dead: Tensor | None = None) -> dict[str, Tensor]:
    """All that a training step computes: activations, reconstruction, losses, gradients."""
    sae.zero_grad()
    x = x.clone().requires_grad_()
    step = TrainStepInput(
        sae_in=x,
        coefficients={"l0": 0.3},
        dead_neuron_mask=dead,
        n_training_steps=0,
        is_logging_step=False,
    )
    out = sae.training_forward_pass(step)
    out.loss.backward()
    found = {"acts": strided(out.feature_acts), "sae_out": out.sae_out, "x.grad": x.grad, "loss": out.loss}
    found |= {f"losses.{name}": loss for name, loss in out.losses.items()}
    found |= {f"{name}.grad": p.grad for name, p in sae.named_parameters()}
    found |= {f"buffer.{name}": buffer.clone() for name, buffer in sae.named_buffers()}
    found["hidden_pre"] = out.hidden_pre  # read last
    return {name: part if part is None else part.detach().clone() for name, part in found.items()}


def strided(acts: Tensor) -> Tensor:
    return acts.to_dense() if acts.is_sparse else acts


def assert_equal(found: dict, right: dict, tolerance: float) -> None:
    assert found.keys() == right.keys()
    for name, part in right.items():
        if part is None:
            assert found[name] is None, name
            continue
        assert found[name].shape == part.shape, name
        assert found[name].dtype == part.dtype, name
        assert found[name].stride() == part.stride(), name
        off, most = (found[name] - part).abs().max(), part.abs().max()
        bound = max(tolerance, 1e-6 if part.dtype == torch.float32 else 0)
        assert off <= bound * max(most, 1e-3), f"{name}: {off:g} of {most:g}"


def compared(sae: nn.Module, x: Tensor, dead: Tensor | None = None) -> Counted:
    """A step with and without our ops."""
    other, tolerance = copy.deepcopy(sae), FLOATS[str(x.dtype).removeprefix("torch.")]
    right = stepped(sae, x, dead)
    with served(), Counted() as seen:
        found = stepped(other, x, dead)
    assert_equal(found, right, tolerance)
    return seen


def some_dead(count: int, below: int = M) -> Tensor:
    dead = torch.zeros(M, dtype=torch.bool)
    dead[torch.randperm(below, generator=torch.Generator().manual_seed(3))[:count]] = True
    return dead


# A step.


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("rescale_acts_by_decoder_norm", [True, False])
@pytest.mark.parametrize("num_dead", [None, 0, 3, 60])
@pytest.mark.parametrize("name", TRAINED)
def test_a_step(name, num_dead, rescale_acts_by_decoder_norm, apply_b_dec_to_input, dtype):
    torch.manual_seed(0)
    if name == "sparse" and rescale_acts_by_decoder_norm:
        pytest.skip("without our ops it has no backward on CPUs")
    sae = trained(
        name,
        dtype,
        rescale_acts_by_decoder_norm=rescale_acts_by_decoder_norm,
        apply_b_dec_to_input=apply_b_dec_to_input,
    )
    seen = compared(sae, tokens(dtype=dtype), None if num_dead is None else some_dead(num_dead))
    assert seen.served["topk_sae.TopKTrainingSAE.encode_with_hidden_pre"] == 1
    assert seen.served["topk_sae.TopKTrainingSAE.decode"] == 1
    if num_dead and name != "matryoshka_aux":
        kind = "abstopk" if name == "abstopk" else "topk"
        assert seen.served[f"{kind}_sae.calculate_{kind}_aux_acts"] == 1
        assert seen.served["topk_sae.act_times_W_dec"] == 1
    if name == "matryoshka_aux" and num_dead == 60:
        assert seen.served["topk_sae.calculate_topk_aux_acts"] == 2
    if "batch" in name or "matryoshka" in name:
        assert seen.served["batchtopk_sae.BatchTopKTrainingSAE.update_topk_threshold"] == 1
    if "matryoshka" in name:
        assert seen.served["matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAE._iterable_decode"] >= 1
    if name != "matryoshka_aux":
        assert not seen.refused


def test_sparse_activations_that_are_scaled():
    torch.manual_seed(0)
    sae, x = trained("topk"), tokens()
    other = trained("sparse")
    other.load_state_dict(sae.state_dict())
    right = stepped(sae, x, some_dead(20))
    with served():
        found = stepped(other, x, some_dead(20))
    assert_equal(found, right, 1e-5)


@pytest.mark.parametrize("normalize_activations", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_normalised_tokens(name, normalize_activations):
    torch.manual_seed(0)
    compared(trained(name, normalize_activations=normalize_activations), tokens())


@pytest.mark.parametrize("leading", [(), (7,), (2, 5), (2, 3, 4), (2, 1, 2, 3)])
@pytest.mark.parametrize("name", ["topk", "sparse", "abstopk", "batchtopk"])
def test_leading_dimensions(name, leading):
    torch.manual_seed(0)
    if name == "sparse" and not leading:
        pytest.skip("the library's own code serves it")
    sae = trained(name, rescale_acts_by_decoder_norm=name != "sparse")
    x = tokens(*leading, D)[..., 0, :] if not leading else tokens(*leading)
    compared(sae, x, some_dead(20) if len(leading) == 1 else None)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("num_dead", [None, 0, 3, 60])
@pytest.mark.parametrize("name", JUMPS)
def test_a_step_of_jumps(name, num_dead, dtype, dense_codes):
    torch.manual_seed(0)
    seen = compared(
        jumping(name, dtype), tokens(dtype=dtype), None if num_dead is None else some_dead(num_dead)
    )
    assert not seen.refused
    assert set(seen.served) == {
        "jumprelu_sae.JumpReLUTrainingSAE.encode_with_hidden_pre",
        "jumprelu_sae.JumpReLUTrainingSAE.calculate_aux_loss",
        "sae.TrainingSAE.decode",
    }


def pursuing(dtype: str = "float32", norms: float = 0.1, **options) -> nn.Module:
    options = {"residual_threshold": 1e-2, "max_iterations": 6} | options
    config = sae_lens.MatchingPursuitTrainingSAEConfig(
        d_in=D, d_sae=M, dtype=dtype, decoder_init_norm=1.0, **options
    )
    sae = sae_lens.MatchingPursuitTrainingSAE(config)
    with torch.no_grad():
        atoms = torch.randn(M, D, dtype=sae.W_dec.dtype)
        sae.W_dec.copy_(atoms / atoms.norm(dim=1, keepdim=True))
        sae.W_dec.mul_(1 + norms * (torch.rand(M, 1, dtype=sae.W_dec.dtype) - 0.5))
    return sae


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("stop_on_duplicate_support", [True, False])
@pytest.mark.parametrize("residual_threshold", [0.0, 1e-2, 1.5, 3.5])
@pytest.mark.parametrize("max_iterations", [1, 6, None])
@pytest.mark.parametrize("norms", [0.0, 0.1])
def test_a_step_of_matching_pursuit(
    dtype, stop_on_duplicate_support, residual_threshold, max_iterations, norms
):
    torch.manual_seed(0)
    sae = pursuing(
        dtype,
        norms,
        residual_threshold=residual_threshold,
        max_iterations=max_iterations,
        stop_on_duplicate_support=stop_on_duplicate_support,
    )
    seen = compared(sae, tokens(dtype=dtype))
    assert seen.served == {
        "matching_pursuit_sae.MatchingPursuitTrainingSAE.encode_with_hidden_pre": 1,
        "matching_pursuit_sae.MatchingPursuitTrainingSAE.decode": 1,
    }


def test_matching_pursuit_in_several_calls(monkeypatch):
    monkeypatch.setattr(adapter, "STEPS", 2)
    for options in ({}, {"residual_threshold": 1.5}, {"stop_on_duplicate_support": False}):
        torch.manual_seed(0)
        compared(pursuing("float64", **options), tokens(2, 9, dtype="float64"))


# Use.


def inference(name: str, **options) -> nn.Module:
    made, config, defaults = {
        "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig, {"k": K}),
        "rescaled": (
            sae_lens.TopKSAE, sae_lens.TopKSAEConfig, {"k": K, "rescale_acts_by_decoder_norm": True},
        ),
        "abstopk": (sae_lens.AbsTopKSAE, sae_lens.AbsTopKSAEConfig, {"k": K}),
        "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig, {}),
        "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig, {}),
        "pursuit": (
            sae_lens.MatchingPursuitSAE, sae_lens.MatchingPursuitSAEConfig, {"max_iterations": 4},
        ),
        "transcoder": (sae_lens.Transcoder, sae_lens.TranscoderConfig, {"d_out": 7}),
        "skip": (sae_lens.SkipTranscoder, sae_lens.SkipTranscoderConfig, {"d_out": 7}),
        "jumping": (sae_lens.JumpReLUTranscoder, sae_lens.JumpReLUTranscoderConfig, {"d_out": 7}),
        "topk_transcoder": (sae_lens.Transcoder, sae_lens.TranscoderConfig, {"d_out": 7}),
    }[name]  # fmt: skip
    if "transcoder" in name or name in ("skip", "jumping"):
        options = {"apply_b_dec_to_input": False} | options
    sae = scattered(made(config(d_in=D, d_sae=M, **(defaults | options))))
    if hasattr(sae, "threshold"):
        sae.threshold.data = torch.rand(M) - 0.2
    if name == "pursuit":
        sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)
    if name == "topk_transcoder":
        sae.activation_fn = topk_sae.TopK(K)
    return sae


USED = [
    "topk", "rescaled", "abstopk", "jumprelu", "standard", "pursuit", "transcoder", "skip", "jumping",
    "topk_transcoder",
]  # fmt: skip


def used(sae: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_(torch.is_grad_enabled())
    acts, out = sae.encode(x), sae(x)
    found = {"acts": acts, "out": out, "decoded": sae.decode(acts.detach().clone())}
    if out.requires_grad:
        sae.zero_grad()
        (out.square().sum() + (acts * torch.arange(M)).sum()).backward()
        found |= {"x.grad": x.grad} | {f"{name}.grad": p.grad for name, p in sae.named_parameters()}
    return {name: part if part is None else part.detach().clone() for name, part in found.items()}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("leading", [(), (N,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("name", USED)
def test_use(name, leading, mode, dense_codes):
    torch.manual_seed(0)
    sae = inference(name)
    x = tokens(1)[0] if not leading else tokens(*leading)
    if name == "pursuit" and not leading:
        pytest.skip("the library has no pursuit of a single token")
    with mode():
        right = used(sae, x)
        with served(), Counted() as seen:
            found = used(sae, x)
        assert_equal(found, right, 1e-5)
    encoders = {site: n for site, n in seen.served.items() if "encode" in site}
    assert sum(encoders.values()) == 2, seen.refused
    decoded = sum(n for site, n in seen.served.items() if "decode" in site)
    assert decoded == (0 if mode is torch.inference_mode else 1)


@pytest.mark.parametrize("name", ["topk", "jumprelu", "transcoder"])
def test_reshaped_heads(name, dense_codes):
    torch.manual_seed(0)
    sae = inference(name)
    if name != "transcoder":
        sae.turn_on_forward_pass_hook_z_reshaping()
        x = torch.randn(5, 3, 4)
    else:
        x = tokens(5)
    with torch.no_grad():
        right = sae(x)
        with served(), Counted() as seen:
            torch.testing.assert_close(sae(x), right, rtol=1e-5, atol=1e-5)
    assert not seen.refused


def test_the_error_term(dense_codes):
    torch.manual_seed(0)
    sae, x = inference("topk"), tokens()
    sae.use_error_term = True
    right = sae(x)
    with served(), Counted() as seen:
        torch.testing.assert_close(sae(x), right, rtol=1e-5, atol=1e-5)
    assert seen.served["topk_sae.TopKSAE.encode"] == 2


# Training.


def training(sae: nn.Module, steps: int, start: int = 0, **options) -> sae_lens.SAETrainer:
    """The library's own trainer, whose data begins with the batch of a step."""
    generator = torch.Generator().manual_seed(7)
    atoms = torch.randn(20, D, generator=generator)

    def batches() -> Iterator[Tensor]:
        while True:
            yield torch.relu(torch.randn(N, 20, generator=generator)) @ atoms

    options |= {"lr": 3e-3, "lr_end": 3e-3, "dead_feature_window": 4}
    config = SAETrainerConfig(total_training_samples=steps * N, train_batch_size_samples=N, **options)
    data = itertools.islice(batches(), start, None)
    return sae_lens.SAETrainer(cfg=config, sae=sae, data_provider=data)


def fitted(sae: nn.Module, steps: int = 20, **options) -> tuple[list[float], nn.Module, dict]:
    """The losses of the library's own trainer, its SAE, and itself."""
    trainer = training(sae, steps, **options)
    losses, step = [], trainer.step
    trainer.step = lambda batch: (out := step(batch), losses.append(out.loss.item()))[0]
    trainer.fit()
    return losses, sae, trainer


def continued(trainer: sae_lens.SAETrainer, steps: int) -> list[float]:
    """The losses of some steps more."""
    losses = []
    for _ in range(steps):
        losses.append(trainer.step(next(trainer.data_provider)).loss.item())
        trainer.n_training_steps += 1
    return losses


def assert_the_same_training(ours: sae_lens.SAETrainer, theirs: sae_lens.SAETrainer) -> None:
    """Weights and all else that is saved, to 1e-7 of the largest: of 200 steps in double precision."""
    states = [dict(trainer.sae.state_dict()) for trainer in (ours, theirs)]
    assert [one.stride() for one in states[0].values()] == [one.stride() for one in states[1].values()]
    single = any(one.dtype == torch.float32 for one in states[1].values())  # thresholds
    within = SINGLE if single else 1e-7
    assert_alike(*states, within)
    assert_alike(ours.optimizer.state_dict(), theirs.optimizer.state_dict(), within)
    for name in ("n_forward_passes_since_fired", "act_freq_scores"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))


def made_for_training(name: str) -> nn.Module:
    torch.manual_seed(0)
    options = {"rescale_acts_by_decoder_norm": False} if name == "sparse" else {}
    return trained(name, "float64", **options) if name in TRAINED else jumping(name, "float64")


def rounding(name: str) -> float:
    """Of losses, relative: thresholds are of single precision."""
    return EXACT if name in TRAINED else 1e-7


@pytest.mark.parametrize("name", [*TRAINED, *JUMPS])
def test_the_trainer(name, dense_codes):
    sae = made_for_training(name)
    other = copy.deepcopy(sae)
    right, sae, trainer = fitted(sae, STEPS)
    with served(), Counted() as seen:
        losses, other, another = fitted(other, STEPS)
    encoder = "topk_sae.TopK" if name in TRAINED else "jumprelu_sae.JumpReLU"
    assert seen.served[f"{encoder}TrainingSAE.encode_with_hidden_pre"] == STEPS
    assert seen.served["sae_lens.training.sae_trainer.SAETrainer._train_step"] == STEPS
    assert losses == pytest.approx(right, rel=rounding(name))
    assert_the_same_training(another, trainer)
    sae.load_state_dict(other.state_dict())


@pytest.mark.parametrize("ours_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"relayout": True, "fused_adam": True}], ids=["plain", "options"])
@pytest.mark.parametrize("name", ["topk", "batchtopk", "step"])
def test_a_run_that_changes_sides(name, options, ours_first, tmp_path, dense_codes):
    """By the files of its library, which either side has written."""
    sae = made_for_training(name)
    others = copy.deepcopy(sae), copy.deepcopy(sae)
    right, _, trainer = fitted(sae, STEPS)
    sides = [lambda: served(**options), nullcontext]
    first, last = sides if ours_first else reversed(sides)
    with first():
        begun = training(others[0], STEPS)
        losses = continued(begun, STEPS // 2)
        begun.save_checkpoint("half", base_path=tmp_path)
    with last():
        other = training(others[1], STEPS, STEPS // 2)
        other.load_trainer_state(tmp_path / "half")
        other.sae.load_weights_from_checkpoint(tmp_path / "half")
        losses += continued(other, STEPS // 2)
    assert losses == pytest.approx(right, rel=rounding(name))
    assert_the_same_training(other, trainer)


@pytest.mark.parametrize("name", ["topk", "sparse", "batchtopk", "matryoshka", "step"])
@pytest.mark.parametrize(
    ("relayout", "fused_adam"),
    [(True, False), (False, True), (True, True)],
    ids=["laid", "fused", "both"],
)
def test_options_of_the_trainer(name, relayout, fused_adam, monkeypatch, dense_codes):
    sae = made_for_training(name)
    other = copy.deepcopy(sae)
    right, sae, trainer = fitted(sae)
    steps, fused = [], torch._fused_adam_
    monkeypatch.setattr(torch, "_fused_adam_", lambda *a, **k: (steps.append(1), fused(*a, **k))[1])
    with served(relayout=relayout, fused_adam=fused_adam):
        losses, other, another = fitted(other)
        assert len(steps) in ((20, 40) if fused_adam else (0,))  # once a dtype
    columns, rows = (M, 1), (1, D)
    assert other.W_enc.stride() == (rows if relayout else columns)
    assert another.optimizer.state[other.W_enc]["exp_avg"].stride() == other.W_enc.stride()
    assert losses == pytest.approx(right, rel=rounding(name))
    assert_the_same_training(another, trainer)
    # It goes on without our ops, and copies are as the library makes them.
    assert continued(another, 5) == pytest.approx(continued(trainer, 5), rel=rounding(name))
    assert_the_same_training(another, trainer)
    twin, optimizer = copy.deepcopy((other, another.optimizer))
    assert twin.W_enc.stride() == other.W_enc.stride()
    assert optimizer.param_groups[0]["fused"] is None
    other.load_state_dict(sae.state_dict(), assign=True)
    assert other.W_enc.stride() == (rows if relayout else columns)


def test_options_of_trainers_that_they_do_not_fit():
    torch.manual_seed(0)
    with served(relayout=True, fused_adam=True):
        assert training(pursuing(), 2).optimizer.param_groups[0]["fused"] is None
        gated = sae_lens.GatedTrainingSAE(sae_lens.GatedTrainingSAEConfig(d_in=D, d_sae=M))
        training(gated, 2)
    assert gated.W_enc.stride() == (M, 1)  # its encoder isn't served
    assert training(trained("topk"), 2).sae.W_enc.stride() == (M, 1)
    with pytest.raises(TypeError, match="sae_lens: relayout must be a bool, got 1 of type int"):
        served(relayout=1)


def test_the_trainer_under_autocast():
    torch.manual_seed(0)
    sae = trained("topk")
    other = copy.deepcopy(sae)
    right, *_ = fitted(sae, autocast=True)
    with served(), Counted() as seen:
        losses, *_ = fitted(other, autocast=True)
    assert seen.served["topk_sae.TopKTrainingSAE.encode_with_hidden_pre"] == 20
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(right), rtol=0.02, atol=0)


def test_the_trainer_of_matching_pursuit():
    """Its atoms soon have other norms than 1."""
    torch.manual_seed(0)
    sae = pursuing("float64", 0.0)
    other = copy.deepcopy(sae)
    right, *_ = fitted(sae)
    with served(), Counted() as seen:
        losses, *_ = fitted(other)
    assert seen.served["matching_pursuit_sae.MatchingPursuitTrainingSAE.encode_with_hidden_pre"] == 20
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(right), rtol=1e-9, atol=0)


def test_saving_and_folding(tmp_path):
    """What is saved for inference is what the library saves."""
    saved = []
    for patched in (False, True):
        torch.manual_seed(0)
        sae = trained("batchtopk", dtype="float64")
        if patched:
            adapter.apply(least_work=0)
        fitted(sae)
        sae.save_inference_model(tmp_path / str(patched))
        saved.append(sae_lens.SAE.load_from_disk(tmp_path / str(patched)))
    x = tokens(dtype="float64")
    assert_equal(dict(saved[1].state_dict()), dict(saved[0].state_dict()), 1e-7)
    adapter.undo()
    torch.testing.assert_close(saved[1](x), saved[0](x))


# Traps.


@pytest.mark.parametrize("name", ["topk", "abstopk", "batchtopk", "matryoshka", "step", "anthropic"])
def test_autocast_gives_the_dtypes_of_the_library(name, dense_codes):
    torch.manual_seed(0)
    for _ in range(3):
        sae = trained(name) if name in TRAINED else jumping(name)
        other = copy.deepcopy(sae)
        with torch.autocast("cpu", torch.bfloat16):
            right = stepped(sae, tokens(), some_dead(20))
            with served(), Counted() as seen:
                found = stepped(other, tokens(), some_dead(20))
        assert not seen.refused
        same = (found["acts"] != 0) == (right["acts"] != 0)
        assert same.double().mean() > 0.98
        assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in right.items()}
        torch.testing.assert_close(found["loss"], right["loss"], rtol=0.02, atol=0)
        torch.testing.assert_close(found["sae_out"].norm(), right["sae_out"].norm(), rtol=0.02, atol=0)


def test_parameters_of_half_precision():
    torch.manual_seed(0)
    for name in sorted(TRAINED.keys() - {"sparse"}):  # which has no such product
        sae = trained(name, "bfloat16")
        other = copy.deepcopy(sae)
        right = stepped(sae, tokens(dtype="bfloat16"), some_dead(20))
        with served(), Counted() as seen:
            found = stepped(other, tokens(dtype="bfloat16"), some_dead(20))
        assert seen.served["topk_sae.TopKTrainingSAE.encode_with_hidden_pre"] == 1
        assert {k: (v.dtype, v.shape) for k, v in found.items()} == {
            k: (v.dtype, v.shape) for k, v in right.items()
        }
        assert ((found["acts"] != 0) == (right["acts"] != 0)).double().mean() > 0.98
        torch.testing.assert_close(found["loss"], right["loss"], rtol=0.03, atol=0)


def test_losses_of_pre_activations():
    torch.manual_seed(0)
    for dtype, tolerance in FLOATS.items():
        sae, x = trained("topk", dtype), tokens(dtype=dtype)
        other = copy.deepcopy(sae)

        def penalised(sae: nn.Module, x=x) -> dict[str, Tensor]:
            acts, hidden_pre = sae.encode_with_hidden_pre(x)
            (sae.decode(acts).square().sum() + torch.relu(hidden_pre - 0.1).square().sum()).backward()
            return {name: p.grad for name, p in sae.named_parameters()}

        right = penalised(sae)
        with served():
            assert_equal(penalised(other), right, tolerance)


def test_activations_that_are_read_have_the_gradient_through_the_norms():
    torch.manual_seed(0)
    sae, x = trained("topk"), tokens()
    other = copy.deepcopy(sae)

    def penalised(sae: nn.Module) -> dict[str, Tensor]:
        acts = sae.encode(x)
        (sae.decode(acts).square().sum() + (acts * torch.arange(M)).sum()).backward()
        return {name: p.grad for name, p in sae.named_parameters()}

    right = penalised(sae)
    with served():
        assert_equal(penalised(other), right, 1e-5)


def test_activations_changed_in_place():
    torch.manual_seed(0)
    sae, x = trained("topk"), tokens()

    def ablated() -> Tensor:
        acts = sae.encode(x)
        acts[:, ::2] = 0
        return sae.decode(acts)

    right = ablated()
    with served(), Counted() as seen:
        found = ablated()
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    assert seen.refused["topk_sae.TopKTrainingSAE.decode", "activations: changed in place"] == 1


def test_atoms_that_change_between_encoding_and_decoding():
    """By an optimiser, and through .data, which leaves no trace but the norms."""
    torch.manual_seed(0)
    sae, x = trained("topk"), tokens()
    for change in (
        lambda: sae.W_dec.data.mul_(1 + torch.rand(M, 1)),
        sae.fold_W_dec_norm,
        lambda: torch.optim.SGD([sae.W_dec], lr=0.1).step(),
    ):
        sae.W_dec.grad = torch.randn(M, D)
        start = copy.deepcopy(sae.state_dict())

        def changed(change=change, start=start) -> Tensor:
            sae.load_state_dict(start)
            acts = sae.encode(x)
            change()
            return sae.decode(acts)

        right = changed()
        with served(), Counted() as seen:
            found = changed()
        assert seen.served["topk_sae.TopKTrainingSAE.decode"] == 1
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("look", ["hook", "retain_grad", "register_hook", "grad_of_hooked"])
def test_who_looks_at_gradients_gets_them(look):
    torch.manual_seed(0)
    sae, x = inference("rescaled"), tokens()

    def grad_of_acts() -> Tensor:
        kept = []
        if look in ("hook", "grad_of_hooked"):
            if look == "hook":
                sae.hook_sae_acts_post.add_hook(lambda grad, hook: kept.append(grad), dir="bwd")
            else:
                sae.hook_sae_acts_post.add_hook(lambda acts, hook: kept.append(acts))
            out = sae(x).square().sum()
            sae.hook_sae_acts_post.remove_hooks("both")
            if look == "hook":
                out.backward()
                return kept[0]
            return torch.autograd.grad(out, kept[0])[0]
        acts = sae.encode(x)
        if look == "retain_grad":
            acts.retain_grad()
        else:
            acts.register_hook(kept.append)
        sae.decode(acts).square().sum().backward()
        return acts.grad if look == "retain_grad" else kept[0]

    right = grad_of_acts()
    with served():
        found = grad_of_acts()
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("point", ["hook_sae_acts_pre", "hook_sae_acts_post", "activation_fn", "anywhere"])
def test_hooks_are_served_by_the_library(point):
    torch.manual_seed(0)
    sae, x = trained("topk"), tokens()
    seen_by_hook = []

    def hook(module, inputs, output):
        seen_by_hook.append(output.clone())
        return output * 2 if module is not sae else None

    with served():
        handle = (
            nn.modules.module.register_module_forward_hook(lambda *_: None)
            if point == "anywhere"
            else getattr(sae, point).register_forward_hook(hook)
        )
        with Counted() as seen:
            found = stepped(sae, x)
        handle.remove()
    assert seen.refused["topk_sae.TopKTrainingSAE.encode_with_hidden_pre", "hooks"] == 1
    if point == "anywhere":
        return
    handle = getattr(sae, point).register_forward_hook(hook)
    right = stepped(sae, x)
    handle.remove()
    assert_equal(found, right, 1e-6)


def test_hooks_elsewhere_are_called_once():
    torch.manual_seed(0)
    sae, x, calls = trained("topk"), tokens(), []
    for point in ("hook_sae_input", "hook_sae_recons"):
        getattr(sae, point).add_hook(lambda value, hook: (calls.append(hook.name), value * 1.5)[1])
    seen = compared(sae, x)
    assert seen.served["topk_sae.TopKTrainingSAE.encode_with_hidden_pre"] == 1
    assert sorted(calls) == 2 * ["hook_sae_input"] + 2 * ["hook_sae_recons"]


def test_caches_hold_what_the_library_gives():
    torch.manual_seed(0)
    sae, x = inference("topk"), tokens()
    out, cache = sae.run_with_cache(x)
    with served():
        again, other = sae.run_with_cache(x)
    torch.testing.assert_close(again, out)
    assert cache.keys() == other.keys()
    for name in cache:
        torch.testing.assert_close(other[name], cache[name])


def test_copies_and_pickles_are_ordinary():
    torch.manual_seed(0)
    sae, x = trained("topk"), tokens()
    with served(), torch.no_grad():
        acts, hidden_pre = sae.encode_with_hidden_pre(x)
        assert code_of(acts) is not None
        assert type(hidden_pre) is Preactivations
        for other in (copy.deepcopy(acts), pickle.loads(pickle.dumps(acts)), acts.clone()):
            assert torch.equal(other, acts)
            assert code_of(other) is None
            torch.testing.assert_close(sae.decode(other), sae.decode(acts), rtol=1e-5, atol=1e-5)
        assert type(copy.deepcopy(hidden_pre)) is Tensor
        buffer = io.BytesIO()
        torch.save({"acts": acts, "hidden_pre": hidden_pre}, buffer)
        buffer.seek(0)
        torch.testing.assert_close(torch.load(buffer)["hidden_pre"], hidden_pre + 0)


def test_pre_activations_after_a_step_are_an_error():
    torch.manual_seed(0)
    sae, x = trained("topk"), tokens()
    with served():
        _, hidden_pre = sae.encode_with_hidden_pre(x)
        torch.optim.SGD(sae.parameters(), lr=0.1).step()
        stepped(sae, x)
        torch.optim.SGD(sae.parameters(), lr=0.1).step()
        with pytest.raises(RuntimeError, match="changed in place since"):
            hidden_pre.sum()


def test_an_atom_of_norm_zero():
    torch.manual_seed(0)
    sae, x = trained("topk"), tokens()
    sae.W_dec.data[3] = 0
    with served(), Counted() as seen:
        out = sae.decode(sae.encode(x))
    assert out.isnan().all()
    assert ("topk_sae.TopKTrainingSAE.encode_with_hidden_pre", "an atom of norm 0") in seen.refused


def test_negative_pre_activations_are_picked_and_zero():
    torch.manual_seed(0)
    for name in ("topk", "batchtopk", "matryoshka"):
        sae = trained(name)
        sae.b_enc.data.fill_(-1.5)
        compared(sae, tokens(), some_dead(20))
        sae.b_enc.data.fill_(-1e3)
        compared(sae, tokens(), some_dead(20))


def test_torch_compile_traces_the_library():
    torch.manual_seed(0)
    sae, x = inference("topk"), tokens()
    right = sae(x)
    with served(), Counted() as seen:
        compiled = torch.compile(sae, backend="eager")
        torch.testing.assert_close(compiled(x), right)
    assert not seen.served


def test_transforms_of_functions_are_served_by_the_library():
    torch.manual_seed(0)
    sae, x = inference("topk"), tokens()
    with torch.no_grad():
        right = sae(x)
        with served(), Counted() as seen:
            torch.testing.assert_close(torch.vmap(sae)(x), right, rtol=1e-5, atol=1e-5)
    assert not seen.served


# What is refused.


def other_activation(sae: nn.Module) -> None:
    sae.activation_fn = type("Mine", (topk_sae.TopK,), {})(K)


def wide_k(sae: nn.Module) -> None:
    sae.activation_fn.k = M // 2


def half(sae: nn.Module) -> None:
    sae.to(torch.bfloat16)
    sae.b_enc.data = sae.b_enc.data.float()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (other_activation, "an activation function that isn't known"),
        (wide_k, "k > M / 4"),
        (half, "parameters of several dtypes, or of one that our ops don't take"),
    ],
)
def test_refusals(spoil, why):
    torch.manual_seed(0)
    sae, x = trained("topk"), tokens()
    spoil(sae)
    with torch.no_grad():
        right = sae.encode(x)
        with served(), Counted() as seen:
            assert torch.equal(sae.encode(x), right)
        assert seen.refused == {("topk_sae.TopKTrainingSAE.encode_with_hidden_pre", why): 1}
        with served(on_refuse="raise"), pytest.raises(RuntimeError, match="library's own code"):
            sae.encode(x)
        adapter.LIBRARY._refused.clear()
        with served(on_refuse="warn"):
            with pytest.warns(UserWarning, match="library's own code"):
                sae.encode(x)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                sae.encode(x)  # once a reason


def test_little_work():
    torch.manual_seed(0)
    sae = trained("topk")
    with adapter.apply(), Counted() as seen:
        sae.encode(tokens())
    assert seen.refused == {("topk_sae.TopKTrainingSAE.encode_with_hidden_pre", "little work"): 1}


def test_errors_are_the_librarys():
    sae = trained("topk")
    with served():
        for x in (torch.randn(3, D + 1), torch.randn(2, 3, 4)):
            with pytest.raises(RuntimeError, match="size of tensor"):
                sae.encode(x)
        sae.activation_fn.k = 0
        assert not sae.encode(tokens()).any()
        with pytest.raises(RuntimeError):
            sae.decode(torch.randn(3, M + 1))


def test_many_active_latents_are_left_to_the_library():
    torch.manual_seed(0)
    for sae in (jumping("step"), inference("jumprelu"), inference("standard"), inference("transcoder")):
        x = tokens()
        bias, known = sae.b_enc.data.clone(), sae.encode(x)
        with served(), Counted() as seen:
            torch.testing.assert_close(sae.encode(x), known)
        assert [why for _, why in seen.refused] == ["more than one latent of 16 is active"]
        assert not seen.served
        sae.b_enc.data = bias - 3  # now few are: that is noticed
        known = sae.encode(x)
        with served(), Counted() as seen:
            torch.testing.assert_close(sae.encode(x), known)
            sae.encode(x)
        assert not seen.refused


def test_pursuits_that_are_refused():
    torch.manual_seed(0)
    sae, x = pursuing(), tokens()
    sae.W_dec.data[2] *= 2
    with served(), Counted() as seen, torch.no_grad():
        sae.encode(x)
    assert {why for _, why in seen.refused} == {"an atom of a norm above 1.4"}
    sae = pursuing()
    with served(), Counted() as seen, torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            sae.encode(x)
        sae.to(torch.bfloat16).encode(x)
    assert {why.split(",")[0] for _, why in seen.refused} == {"autocast", "tokens of another width or dtype"}


# Putting it there, and taking it away.


def test_undo_leaves_nothing():
    changed = changed_by("sae_lens", lambda: served(relayout=True, fused_adam=True))
    for module in (topk_sae, abstopk_sae, matryoshka):  # also what they import by name
        assert f"{module.__name__}.act_times_W_dec" in changed
    assert f"{matryoshka.__name__}.calculate_topk_aux_acts" in changed
    sites = adapter.LIBRARY.sites + adapter.LIBRARY.options["relayout"]
    assert {name.split(".")[-1] for name in changed} == {site.attribute for site in sites}


def test_apply_for_all_that_are_imported():
    with fastsparse.compat.apply(least_work=0):
        assert any(status.library == "sae_lens" and status.applied for status in fastsparse.compat.status())
    assert not adapter.status().applied


def test_twice():
    with served(), pytest.raises(RuntimeError, match="undo"):
        adapter.apply()


@pytest.mark.parametrize("name", [*TRAINED, "pursuit", "jumprelu", "topk_transcoder"])
def test_one_module_alone(name, monkeypatch, dense_codes):
    monkeypatch.setattr(adapter.LIBRARY, "least_work", 0)
    torch.manual_seed(0)
    rescaled = {"rescale_acts_by_decoder_norm": False} if name == "sparse" else {}
    sae = trained(name, **rescaled) if name in TRAINED else inference(name)
    run: Callable = (lambda sae: stepped(sae, tokens(), some_dead(20))) if name in TRAINED else (
        lambda sae: used(sae, tokens())
    )  # fmt: skip
    one = copy.deepcopy(sae)
    with Counted() as seen:
        assert adapter.convert(one) is one
        twin = copy.deepcopy(one)
        found = run(one)
    assert seen.served
    assert twin.decode.__self__ is twin
    with Counted() as seen:
        right = run(sae)
    assert not seen.served
    assert_equal(found, right, 1e-5)
    assert_equal(run(twin), right, 1e-5)
    with pytest.raises(TypeError, match="module must be of a class that is served"):
        adapter.convert(nn.Linear(2, 3))


# The layout of the encoder.


def test_relayout(tmp_path):
    runs = []
    for laid_out in (False, True):
        torch.manual_seed(0)
        sae = trained("topk", dtype="float64")
        if laid_out:
            assert adapter.relayout_(sae) is sae
            adapter.relayout_(sae)
            assert len(sae._state_dict_hooks) == 1
            adapter.apply(least_work=0)
        losses, sae, trainer = fitted(sae, 5)
        assert sae.W_enc.stride() == ((1, D) if laid_out else (M, 1))
        state = trainer.optimizer.state[sae.W_enc]
        assert state["exp_avg"].stride() == sae.W_enc.stride()
        sae.save_model(tmp_path / f"model-{laid_out}")
        sae.save_inference_model(tmp_path / f"inference-{laid_out}")
        runs.append((losses, sae))
    adapter.undo()
    torch.testing.assert_close(torch.tensor(runs[1][0]), torch.tensor(runs[0][0]), rtol=1e-9, atol=0)
    plain, laid_out = (sae.state_dict() for _, sae in runs)
    assert_equal(dict(laid_out), dict(plain), 1e-9)
    for kind in ("model", "inference"):
        loaded = [
            (sae_lens.TrainingSAE if kind == "model" else sae_lens.SAE).load_from_disk(
                tmp_path / f"{kind}-{b}"
            )
            for b in (False, True)
        ]
        assert_equal(dict(loaded[1].state_dict()), dict(loaded[0].state_dict()), 1e-9)


@pytest.mark.parametrize("assign", [False, True])
def test_a_layout_stays(assign):
    torch.manual_seed(0)
    sae, other = trained("topk"), trained("topk")
    adapter.relayout_(sae)
    sae.load_state_dict(other.state_dict(), assign=assign)
    assert sae.W_enc.stride() == (1, D)
    assert torch.equal(sae.W_enc, other.W_enc)
    assert isinstance(sae.W_enc, nn.Parameter)
    for again in (
        copy.deepcopy(sae),
        copy.deepcopy(sae).to(torch.float64),
        pickle.loads(pickle.dumps(sae.W_enc)),
    ):
        assert (again if isinstance(again, Tensor) else again.W_enc).stride() == (1, D)
    twin = copy.deepcopy(sae)
    twin.load_state_dict(trained("topk").state_dict(), assign=assign)
    assert twin.W_enc.stride() == (1, D)
    whole = nn.ModuleDict({"sae": sae})
    assert whole.state_dict()["sae.W_enc"].is_contiguous()
    sae.fold_W_dec_norm()
    assert sae.W_enc.stride() == (1, D)
    with pytest.raises(TypeError, match="relayout_: sae must have a parameter W_enc"):
        adapter.relayout_(nn.Linear(2, 3))


# Slices of what isn't computed.


def test_slices_of_pre_activations():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5, D), torch.randn(M, D), torch.randn(M)
    leaves = [leaf.requires_grad_() for leaf in (x, weight, bias)]
    whole = preactivations(*leaves)
    for index in ((..., slice(10, 40)), (slice(None), slice(None), slice(10, 40))):
        part = whole[index]
        assert type(part) is Preactivations
        assert whole.computed is None
        torch.testing.assert_close(part + 0, (x @ weight.T + bias)[..., 10:40])
        found = torch.autograd.grad(part.square().sum(), leaves)
        right = torch.autograd.grad((x @ weight.T + bias)[..., 10:40].square().sum(), leaves)
        torch.testing.assert_close(found, right)
    for index in (0, (..., 3), (..., slice(0, 40, 2)), (0, ..., slice(0, 4)), torch.tensor([1])):
        torch.testing.assert_close(preactivations(*leaves)[index], (x @ weight.T + bias)[index])


# Gradients of activations that are asked for when all is decoded.


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("how", ["grad", "retained", "both"])
def test_gradients_of_activations_that_are_wanted_late(rescaled, how):
    def derivatives():
        torch.manual_seed(0)
        sae, x = trained("topk", "float64", rescale_acts_by_decoder_norm=rescaled), tokens(dtype="float64")
        acts, _ = sae.encode_with_hidden_pre(x)
        loss = sae.decode(acts).pow(3).sum()
        if how == "both":
            loss = loss + acts.square().sum()
        if how != "retained":
            return torch.autograd.grad(loss, acts)
        acts.retain_grad()
        loss.backward()
        return acts.grad, *(parameter.grad for parameter in sae.parameters())

    right = derivatives()
    with served(), Counted() as seen:
        found = derivatives()
    assert "topk_sae.TopKTrainingSAE.decode" in seen.served
    for mine, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(mine, theirs)
