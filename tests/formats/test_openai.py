"""openai/sparse_autoencoder's layout: ReLU as it is, TopK of tokens that the caller normalises."""

from pathlib import Path

import pytest
import torch
from autoencoders import D, K, tokens
from layouts import check, largest, openai, parameters, scores

from fastsparse import formats
from fastsparse.nn import ReLUSAE, TopKSAE


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("activation", ["ReLU", None])
def test_relu(tmp_path: Path, activation: str | None, dtype: torch.dtype) -> None:
    sae = formats.load(openai(activation, dtype).write(tmp_path))
    p, x = parameters(dtype), tokens(50, D, dtype=dtype)
    assert type(sae) is ReLUSAE
    code = scores(p, x, centered=True).relu()
    check(sae, x, code, code @ p.W_dec + p.b_dec)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_topk_of_normalised_tokens(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = openai("TopK", dtype).write(tmp_path)
    with pytest.raises(ValueError, match=r"6.pt: activation must be ReLU, got TopK, whose tokens are"):
        formats.load(folder)
    sae, p, x = formats.load(folder, normalized=True), parameters(dtype), tokens(50, D, dtype=dtype)
    assert type(sae) is TopKSAE
    x = x - x.mean(1, keepdim=True)
    x = x / (x.std(1, keepdim=True) + 1e-5)
    code = largest(scores(p, x, centered=True), K).relu()
    check(sae, x, code, code @ p.W_dec + p.b_dec)


def test_topk_as_its_training_keeps_it(tmp_path: Path) -> None:
    """Without the activation, and without normalising."""
    sae = formats.load(openai(None, torch.float64).write(tmp_path), k=7)
    p, x = parameters(), tokens(50, D, dtype=torch.float64)
    code = largest(scores(p, x, centered=True), 7).relu()
    check(sae, x, code, code @ p.W_dec + p.b_dec)


def test_what_is_refused_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"6.pt: activation must be ReLU or TopK, got 'Identity'"):
        formats.load(openai("Identity").write(tmp_path))
    for told, said in (
        ({}, "activation_state_dict must say k, of type int, got {}"),
        ({"k": 5.0}, "activation_state_dict must say k, of type int, got {'k': 5.0}"),
        ({"k": 5, "postact_fn": "Identity"}, "postact_fn must be ReLU, got 'Identity'"),
    ):
        with pytest.raises(ValueError, match=f"6.pt: .*{said}"):
            formats.load(openai("TopK").holding(activation_state_dict=told).write(tmp_path), normalized=True)
