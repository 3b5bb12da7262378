"""dictionary_learning's layout: each class."""

from pathlib import Path

import pytest
import torch
from autoencoders import D, K, M, tokens
from layouts import check, dictionary_learning, largest, parameters, scores

from fastsparse import formats
from fastsparse.nn import BatchTopKSAE, GatedSAE, JumpReLUSAE, ReLUSAE, TopKSAE


def code_of(dict_class: str, x: torch.Tensor) -> torch.Tensor:
    p = parameters(x.dtype)
    z = scores(p, x, centered=dict_class not in ("JumpReluAutoEncoder", "AutoEncoderNew"))
    if dict_class == "AutoEncoderTopK":
        return largest(z.relu(), K)
    if dict_class.endswith("BatchTopKSAE"):
        return z * (z > 0.5)
    if dict_class == "JumpReluAutoEncoder":
        return (z * (z > p.threshold)).relu()
    if dict_class == "GatedAutoEncoder":
        return (z > 0) * ((z - p.b_enc) * p.r_mag.exp() + p.b_mag).relu()
    return z.relu()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("dict_class", "kind"),
    [
        ("AutoEncoderTopK", TopKSAE),
        ("BatchTopKSAE", BatchTopKSAE),
        ("MatryoshkaBatchTopKSAE", BatchTopKSAE),
        ("JumpReluAutoEncoder", JumpReLUSAE),
        ("GatedAutoEncoder", GatedSAE),
        ("AutoEncoder", ReLUSAE),
        ("AutoEncoderNew", ReLUSAE),
    ],
)
def test_codes_and_reconstructions(tmp_path: Path, dict_class: str, kind: type, dtype: torch.dtype) -> None:
    sae = formats.load(dictionary_learning(dict_class, dtype).write(tmp_path))
    p, x = parameters(dtype), tokens(50, D, dtype=dtype)
    assert type(sae) is kind
    code = code_of(dict_class, x)
    check(sae, x, code, code @ p.W_dec + p.b_dec)


def test_groups_are_prefixes(tmp_path: Path) -> None:
    weights = [0.5, 0.3, 0.2]
    published = dictionary_learning("MatryoshkaBatchTopKSAE", group_weights=weights)
    sae = formats.load(published.write(tmp_path))
    assert (sae.k, sae.prefixes, sae.prefix_weights) == (K, (5, 20), tuple(weights))


def test_a_training_steps_file_in_its_own_folder(tmp_path: Path) -> None:
    dictionary_learning()._replace(weights="checkpoints/ae_100.pt").write(tmp_path)
    assert type(formats.load(tmp_path / "checkpoints" / "ae_100.pt")) is TopKSAE
    assert type(formats.load(tmp_path / "checkpoints")) is TopKSAE


def test_files_that_are_older_than_k_and_thresholds(tmp_path: Path) -> None:
    sae = formats.load(dictionary_learning().holding(k=None, threshold=None).write(tmp_path))
    assert (sae.k, sae.threshold.item()) == (K, 0)


def test_a_threshold_that_was_never_followed_is_none(tmp_path: Path) -> None:
    published = dictionary_learning("BatchTopKSAE").holding(threshold=torch.tensor(-1.0))
    sae = formats.load(published.write(tmp_path))
    with pytest.raises(RuntimeError, match=r"threshold must be known in evaluation mode, got 0"):
        sae.encode(tokens(3, D))


@pytest.mark.parametrize(
    ("dict_class", "options", "said"),
    [
        ("AutoEncoderTopK", {"dict_class": "Other"}, 'trainer.dict_class must be .*, got "Other"'),
        ("AutoEncoderTopK", {"k": 7}, f"trainer.k must be as in ae.pt, {K}, got 7"),
        ("AutoEncoderTopK", {"k": None}, "must say trainer.k, it says "),
        ("AutoEncoderTopK", {"dict_size": M + 1}, r"encoder.weight must have shape \(M, D\) = "),
        ("MatryoshkaBatchTopKSAE", {"group_weights": [1.0]}, "prefix_weights must be 3 numbers, got 1"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(tmp_path: Path, dict_class: str, options: dict, said: str) -> None:
    published = dictionary_learning(dict_class)
    folder = published.but(trainer=published.options["trainer"] | options).write(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path}/.*: .*{said}"):
        formats.load(folder)


def test_groups_add_up(tmp_path: Path) -> None:
    published = dictionary_learning("MatryoshkaBatchTopKSAE").holding(group_sizes=torch.tensor([5, 5]))
    with pytest.raises(ValueError, match=rf"ae.pt: group_sizes must add up to M = {M}, got \[5, 5\]"):
        formats.load(published.write(tmp_path))
