"""sparsify's layout: top-k and groups of latents, and back again."""

from pathlib import Path

import pytest
import torch
from autoencoders import D, K, M, make, scrambled, tokens
from layouts import check, largest, parameters, scores, sparsify

from fastsparse import formats
from fastsparse.nn import GatedSAE, TopKSAE


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_topk(tmp_path: Path, dtype: torch.dtype) -> None:
    sae, p, x = formats.load(sparsify(dtype).write(tmp_path)), parameters(dtype), tokens(50, D, dtype=dtype)
    assert type(sae) is TopKSAE
    assert not sae.unit_norm
    code = largest(scores(p, x, centered=True).relu(), K)
    check(sae, x, code, code @ p.W_dec + p.b_dec)


def test_groupmax(tmp_path: Path) -> None:
    sae, p = formats.load(sparsify(torch.float64, activation="groupmax", k=8).write(tmp_path)), parameters()
    x = tokens(50, D, dtype=torch.float64)
    groups = scores(p, x, centered=True).relu().unflatten(1, (8, M // 8))
    code = (groups * (groups == groups.amax(2, keepdim=True))).flatten(1)
    assert (sae.k, sae.groups) == (1, 8)
    check(sae, x, code, code @ p.W_dec + p.b_dec)


def test_sizes_budgets_and_norms(tmp_path: Path) -> None:
    """A width may be said as a factor; Multi-TopK is of the loss alone."""
    published = sparsify(num_latents=0, expansion_factor=4, multi_topk=True, normalize_decoder=True)
    for name in ("encoder__weight", "encoder__bias", "W_dec"):
        tensor = published.tensors[name.replace("__", ".")]
        published = published.holding(**{name: torch.cat([tensor, tensor])[: 4 * D]})
    sae = formats.load(published.write(tmp_path))
    assert (sae.num_latents, sae.budgets, sae.budget_weights) == (4 * D, (K, 4 * K), (1, 1 / 8))
    assert sae.unit_norm


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"transcode": True}, "transcode must be false, got true: the output of a transcoder is another"),
        ({"skip_connection": True}, "skip_connection must be false, got true: no model here adds a product"),
        ({"signed": True}, "signed must be false, got true"),
        ({"activation": "softmax"}, 'activation must be "topk" or "groupmax", got "softmax"'),
        ({"activation": "groupmax", "multi_topk": True}, "multi_topk must be false, got true: groups have"),
        ({"activation": "groupmax", "k": 7}, "TopKSAE: groups must divide num_latents"),
        ({"num_latents": M - 1}, rf"encoder.weight must have shape \(M, D\) = \({M - 1}, {D}\), got"),
        ({"k": "32"}, 'k must be of type int, got "32"'),
    ],
)
def test_what_is_refused_is_named(tmp_path: Path, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{tmp_path}/.*: {said}"):
        formats.load(sparsify(**options).write(tmp_path))


def test_a_skip_that_only_the_tensors_tell_of(tmp_path: Path) -> None:
    published = sparsify().holding(W_skip=torch.zeros(D, D))
    with pytest.raises(ValueError, match=r"must hold encoder.weight, .* and no more, it holds W_skip too"):
        formats.load(published.write(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"groups": 8, "k": 1}, {"budgets": (K, 4 * K), "unit_norm": False}])
def test_there_and_back(tmp_path: Path, options: dict, dtype: torch.dtype) -> None:
    sae = scrambled(TopKSAE, **options).to(dtype).eval()
    formats.save(sae, tmp_path, format="sparsify")
    again = TopKSAE.from_pretrained(tmp_path)
    for name, parameter in sae.named_parameters():
        assert torch.equal(getattr(again, name), parameter), name
    for name in ("k", "groups", "budgets", "unit_norm"):
        assert getattr(again, name) == getattr(sae, name)
    x = tokens(50, D, dtype=dtype)
    assert torch.equal(again(x), sae(x))


def test_what_has_no_place_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^save: sparsify has no place for a GatedSAE"):
        formats.save(make(GatedSAE), tmp_path / "a", format="sparsify")
    with pytest.raises(ValueError, match=r"^save: activation must be 'relu' in sparsify, got 'abs'"):
        formats.save(make(TopKSAE, activation="abs"), tmp_path / "a", format="sparsify")
    with pytest.raises(ValueError, match=r"^save: k must be 1 of each of several groups in sparsify, got 5"):
        formats.save(make(TopKSAE, groups=2), tmp_path / "a", format="sparsify")
    assert not (tmp_path / "a").exists()
