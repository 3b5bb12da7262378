"""Gemma Scope 2's layout."""

from pathlib import Path

import pytest
import torch
from autoencoders import D, M, tokens
from layouts import check, gemma_scope_2, parameters, scores

from fastsparse import formats
from fastsparse.nn import JumpReLUSAE


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("configured", [True, False])
def test_jump_relu(tmp_path: Path, configured: bool, dtype: torch.dtype) -> None:
    published = gemma_scope_2(dtype)
    sae = formats.load((published if configured else published._replace(config=None)).write(tmp_path))
    p, x = parameters(dtype), tokens(50, D, dtype=dtype)
    assert type(sae) is JumpReLUSAE
    z = scores(p, x, centered=False)
    code = (z > p.threshold) * z.relu()
    check(sae, x, code, code @ p.W_dec + p.b_dec)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"affine_connection": True}, "affine_connection must be false, got true: no model here adds"),
        (
            {"hf_hook_point_out": "model.layers.17.mlp"},
            'hf_hook_point_out must be "model.layers.17.output", got "model.layers.17.mlp": the output of a',
        ),
        ({"architecture": "topk"}, 'architecture must be "jump_relu", got "topk"'),
    ],
)
def test_what_is_refused_is_named(tmp_path: Path, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=f"config.json: {said}"):
        formats.load(gemma_scope_2(**options).write(tmp_path))


def test_skips_and_several_layers_are_refused(tmp_path: Path) -> None:
    published = gemma_scope_2().holding(affine_skip_connection=torch.zeros(D, D))
    with pytest.raises(ValueError, match=r"must not hold affine_skip_connection: no model here"):
        formats.load(published.write(tmp_path / "a"))
    published = gemma_scope_2().holding(w_dec=torch.zeros(M, 3, D))
    with pytest.raises(ValueError, match=rf"w_dec must have shape \(M, D\) = .*, got \({M}, 3, {D}\)"):
        formats.load(published.write(tmp_path / "b"))
