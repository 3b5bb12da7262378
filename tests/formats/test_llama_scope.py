"""Llama Scope's layout: activations scaled to a norm, atoms whose norms count, one threshold for all."""

import math
from pathlib import Path

import pytest
import torch
from autoencoders import D, K, M, tokens
from layouts import check, largest, llama_scope, parameters

from fastsparse import formats
from fastsparse.nn import JumpReLUSAE, ReLUSAE, TopKSAE


def expected(x: torch.Tensor, options: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """In the order in which its library computes, its values in the unit of the activations."""
    p = parameters(x.dtype)
    scale = math.sqrt(D) / 1.7 if options.get("norm_activation") != "inference" else 1.0
    b_dec = p.b_dec if options.get("use_decoder_bias", True) else torch.zeros_like(p.b_dec)
    scaled = x * scale
    if options.get("apply_decoder_bias_to_pre_encoder"):
        scaled = scaled - b_dec
    norms = p.W_dec.norm(dim=1)
    norms = norms if options.get("sparsity_include_decoder_norm", True) else torch.ones_like(norms)
    z = (scaled @ p.W_enc.T + p.b_enc) / scale * norms
    activation = options.get("act_fn", "jumprelu")
    threshold = options.get("jump_relu_threshold", 0.75)
    if activation == "relu":
        code = z.relu()
    elif activation == "topk" and not threshold:
        code = largest(z.relu(), K)
    else:
        code = z * (z > threshold)
    return code, (code / norms) @ p.W_dec + b_dec / scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, JumpReLUSAE),
        ({"apply_decoder_bias_to_pre_encoder": True}, JumpReLUSAE),
        ({"sparsity_include_decoder_norm": False}, JumpReLUSAE),
        ({"norm_activation": "inference"}, JumpReLUSAE),
        ({"jump_relu_threshold": -0.5}, JumpReLUSAE),  # lets scores below 0 through
        ({"act_fn": "topk"}, JumpReLUSAE),  # it has a threshold
        ({"act_fn": "topk", "jump_relu_threshold": 0.0}, TopKSAE),
        ({"act_fn": "relu"}, ReLUSAE),
    ],
)
def test_codes_and_reconstructions(tmp_path: Path, options: dict, kind: type, dtype: torch.dtype) -> None:
    sae, x = formats.load(llama_scope(dtype, **options).write(tmp_path)), tokens(50, D, dtype=dtype)
    assert type(sae) is kind
    check(sae, x, *expected(x, options))


def test_without_a_bias(tmp_path: Path) -> None:
    options = {"use_decoder_bias": False}
    published = llama_scope(torch.float64, **options).holding(decoder__bias=None)
    sae, x = formats.load(published.write(tmp_path)), tokens(50, D, dtype=torch.float64)
    check(sae, x, *expected(x, options))


def test_each_place_that_may_be_named(tmp_path: Path) -> None:
    llama_scope().write(tmp_path)
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "final.safetensors"):
        assert type(formats.load(path)) is JumpReLUSAE
    llama_scope()._replace(weights="sae_weights.safetensors").write(tmp_path / "b")
    assert type(formats.load(tmp_path / "b" / "hyperparams.json")) is JumpReLUSAE


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_glu_encoder": True}, "use_glu_encoder must be false, got true"),
        (
            {"hook_point_out": "blocks.8.hook_mlp_out"},
            'hook_point_out must be "blocks.8.hook_resid_post", got',
        ),
        (
            {"norm_activation": "token-wise"},
            'norm_activation must be "dataset-wise" or "inference", got "token',
        ),
        ({"act_fn": "batchtopk"}, 'act_fn must be "jumprelu" or "topk" or "relu", got "batchtopk"'),
        (
            {"dataset_average_activation_norm": {"in": 1.7, "out": 3.0}},
            "dataset_average_activation_norm.out must be 1.7, got 3.0",
        ),
        (
            {"dataset_average_activation_norm": {"in": 0.0}},
            "dataset_average_activation_norm.in must be finite and above 0, got 0.0",
        ),
        ({"dataset_average_activation_norm": None}, "must say dataset_average_activation_norm, it says "),
    ],
)
def test_what_is_refused_is_named(tmp_path: Path, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=f"hyperparams.json: {said}"):
        formats.load(llama_scope(**options).write(tmp_path))


def test_tokens_that_the_caller_scales(tmp_path: Path) -> None:
    published = llama_scope(torch.float64, norm_activation="token-wise")
    sae = formats.load(published.write(tmp_path), normalized=True)
    x = tokens(50, D, dtype=torch.float64)
    x = x * math.sqrt(D) / x.norm(dim=1, keepdim=True)
    check(sae, x, *expected(x, {"norm_activation": "inference"}))
    assert sae.num_latents == M
