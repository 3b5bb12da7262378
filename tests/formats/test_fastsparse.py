"""The own layout: all of a model comes back, bit for bit, and nothing half-written is ever read."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from autoencoders import OPTIONS, D, K, M, make, scrambled, tokens
from layouts import check, fastsparse, largest, parameters, scores

from fastsparse import formats
from fastsparse.formats.fastsparse import MODELS
from fastsparse.nn import BatchTopKSAE, JumpReLUSAE, MatchingPursuitSAE, ReLUSAE, SparseAutoencoder, TopKSAE

# Of every model, options that are not as by default.
CASES = [
    (TopKSAE, {"k": 3, "groups": 4, "aux_k": 2, "aux_weight": 0.1, "dead_after": 77, "unit_norm": False}),
    (TopKSAE, {"budgets": (K, 9), "budget_weights": (1.0, 0.3), "activation": "abs"}),
    (
        BatchTopKSAE,
        {"k": 2.7, "prefixes": (3, 10), "prefix_weights": (0.1, 0.2, 0.7), "threshold_decay": 0.9},
    ),
    (JumpReLUSAE, {"penalty": "quadratic", "target_l0": 6.5, "ste_to_input": True, "threshold": 0.3}),
    (JumpReLUSAE, {"learn_threshold": False, "dense": "stripes"}),
    (JumpReLUSAE, {"threshold_form": "linear", "pre_act_weight": 0.02, "bandwidth": 0.1}),
    (MatchingPursuitSAE, {"nonnegative": False, "aux_k": 3}),
    *((kind, {}) for kind in MODELS.values() if issubclass(kind, SparseAutoencoder)),
]


def assert_same(ours: SparseAutoencoder, expected: SparseAutoencoder) -> None:
    assert type(ours) is type(expected)
    assert ours.options() == expected.options()
    assert repr(ours) == repr(expected)
    found, wanted = ours.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype, name
        assert torch.equal(found[name], wanted[name]), name
    assert {name for name, _ in ours.named_parameters()} == {name for name, _ in expected.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_all_comes_back(tmp_path: Path, kind: type, options: dict, dtype: torch.dtype) -> None:
    sae = scrambled(kind, **options)
    sae.tokens_since_fired.copy_(torch.arange(M))
    for name in ("threshold", "density"):
        if name in dict(sae.named_buffers()):
            getattr(sae, name).fill_(0.123)
    if kind is ReLUSAE:
        sae.l1.fill_(0.7)  # annealed
    sae = sae.to(dtype).eval()  # buffers that were made in fp64 stay so
    sae.save_pretrained(tmp_path / "made" / "here")
    again = kind.from_pretrained(tmp_path / "made" / "here")
    assert_same(again, sae)
    assert not again.training
    x = tokens(20, D, dtype=dtype)
    if kind is not MatchingPursuitSAE or dtype == torch.float64:  # whose atoms lose their norm to rounding
        assert torch.equal(again(x), sae(x))
        assert torch.equal(again.loss(x).loss, sae.loss(x).loss)


def test_options_are_the_constructors(tmp_path: Path) -> None:
    sae = make(JumpReLUSAE, prefixes=[4])
    assert sae.options()["threshold"] == OPTIONS[JumpReLUSAE]["threshold"]
    assert_same(JumpReLUSAE(**sae.options(), generator=torch.Generator().manual_seed(0)), sae)
    assert {"device", "dtype", "generator"}.isdisjoint(sae.options())
    assert list(sae.options())[:2] == ["d_model", "num_latents"]  # in their order: files have the same bytes


def test_by_hand(tmp_path: Path) -> None:
    sae, p = TopKSAE.from_pretrained(fastsparse(torch.float64).write(tmp_path)), parameters()
    x = tokens(50, D, dtype=torch.float64)
    code = largest(scores(p, x, centered=True), K).relu()
    check(sae, x, code, code @ p.W_dec + p.b_dec)
    assert (sae.threshold, sae.tokens_since_fired[7]) == (0.25, 7)


def test_each_path_that_may_be_named(tmp_path: Path) -> None:
    make(TopKSAE).save_pretrained(tmp_path)
    for name in ("", "config.json", "model.safetensors"):
        assert_same(formats.load(str(tmp_path / name)), make(TopKSAE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    sae = make(JumpReLUSAE, learn_threshold=False)
    sae.save_pretrained(tmp_path)
    again = formats.load(tmp_path, dtype=dtype, device=torch.device("cpu"))
    assert again.W_enc.dtype == dtype
    assert again.raw_threshold.dtype == torch.float32
    assert torch.equal(again.W_enc, sae.W_enc.to(dtype))


def test_another_class_is_refused(tmp_path: Path) -> None:
    make(TopKSAE).save_pretrained(tmp_path)
    assert type(SparseAutoencoder.from_pretrained(tmp_path)) is TopKSAE
    with pytest.raises(
        ValueError, match=r"^ReLUSAE.from_pretrained: .* must hold a ReLUSAE, it holds a TopKSAE"
    ):
        ReLUSAE.from_pretrained(tmp_path)


def test_an_older_model_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    old, new = make(TopKSAE), make(ReLUSAE, 1)
    old.save_pretrained(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr("fastsparse.formats._format.json.dumps", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            new.save_pretrained(tmp_path)
    assert_same(formats.load(tmp_path), old)
    with monkeypatch.context() as broken:  # as a full disk, when all but the last byte is written
        broken.setattr(safetensors.torch, "save", lambda _: Full())
        with pytest.raises(TypeError):
            new.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(formats.load(tmp_path), old)
    new.save_pretrained(tmp_path)
    assert_same(formats.load(tmp_path), new)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


class Full:
    """Bytes that can't be written."""


def test_weights_are_never_read_by_another_models_options(tmp_path: Path, monkeypatch) -> None:
    """Killed between the two files, a model that is saved over another leaves none."""
    import os

    make(TopKSAE).save_pretrained(tmp_path)
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target).name == "config.json":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("fastsparse._files.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        make(ReLUSAE, 1).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"must be of a known format, its folder holds model.safetensors; known"
    ):
        formats.load(tmp_path)


def test_subclasses_have_no_name_to_be_found_by(tmp_path: Path) -> None:
    class Mine(TopKSAE):
        pass

    with pytest.raises(ValueError, match=r"^save: model must be one of .*, TopKSAE, .*, got Mine"):
        make(Mine).save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"version": 2}, "version must be 1, got 2"),
        ({"model": "Other"}, 'model must be "BatchTopKSAE" or .*, got "Other"'),
        ({"options": None}, "must say options, it says format, version, model"),
        ({"options": {"num_latents": M}}, "options must be those of TopKSAE: .*missing .* 'd_model' and 'k'"),
        (
            {"options": {"d_model": D, "num_latents": M}},
            "options must be those of TopKSAE: .*missing 1 required positional argument: 'k'",
        ),
        (
            {"options": {"d_model": D, "num_latents": M, "k": 0}},
            "options must be those of TopKSAE: TopKSAE: k must be at least 1, got k=0",
        ),
        (
            {"options": {"d_model": D, "num_latents": M, "k": 1, "other": 1}},
            "options must be those of TopKSAE: .*unexpected keyword argument 'other'",
        ),
    ],
)
def test_what_is_refused_is_named(tmp_path: Path, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=f"config.json: {said}"):
        formats.load(fastsparse().but(**options).write(tmp_path))


def test_sizes_agree(tmp_path: Path) -> None:
    published = fastsparse().but(options={"d_model": D, "num_latents": 10**12, "k": 1})
    with pytest.raises(ValueError, match=rf"W_dec must have shape \({10**12}, {D}\), got \({M}, {D}\)"):
        formats.load(published.write(tmp_path))


def test_numbers_of_other_libraries_are_written(tmp_path: Path) -> None:
    import numpy as np

    make(ReLUSAE, l1=0.5, aux_weight=np.float64(0.25), prefixes=np.array([3, 7])).save_pretrained(tmp_path)
    options = json.loads((tmp_path / "config.json").read_text())["options"]
    assert (options["aux_weight"], options["prefixes"]) == (0.25, [3, 7])


def test_sharded_parameters_are_refused(tmp_path: Path) -> None:
    sae = make(TopKSAE)
    sae.W_dec.placements = ("Shard(0)",)
    state = sae.state_dict
    sae.state_dict = lambda: state() | {"W_dec": sae.W_dec}
    with pytest.raises(ValueError, match=r"^save: W_dec must be gathered first, got .'Shard\(0\)',."):
        sae.save_pretrained(tmp_path)
