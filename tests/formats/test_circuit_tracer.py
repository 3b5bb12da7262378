"""circuit-tracer's transcoders of one layer."""

from pathlib import Path

import pytest
import torch
from autoencoders import D, M, tokens
from layouts import Published, check, circuit_tracer, parameters, scores

from fastsparse import formats
from fastsparse.nn import JumpReLUSAE, ReLUSAE


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_relu(tmp_path: Path, dtype: torch.dtype) -> None:
    sae = formats.load(circuit_tracer(dtype).write(tmp_path))
    p, x = parameters(dtype), tokens(50, D, dtype=dtype)
    assert type(sae) is ReLUSAE
    code = scores(p, x, centered=False).relu()
    check(sae, x, code, code @ p.W_dec + p.b_dec)


def test_thresholds_below_0_let_scores_below_0_through(tmp_path: Path) -> None:
    sae = formats.load(circuit_tracer(torch.float64, threshold=True).write(tmp_path))
    p, x = parameters(), tokens(50, D, dtype=torch.float64)
    assert type(sae) is JumpReLUSAE
    z = scores(p, x, centered=False)
    code = z * (z > p.threshold)
    assert (code < 0).any()
    check(sae, x, code, code @ p.W_dec + p.b_dec)


def test_skips_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layer_3.safetensors: must not hold W_skip: no model here adds"):
        formats.load(circuit_tracer().holding(W_skip=torch.zeros(D, D)).write(tmp_path))


def test_cross_layer_transcoders_are_refused(tmp_path: Path) -> None:
    p = parameters(torch.float32)
    encoder = {"W_enc_3": p.W_enc, "b_enc_3": p.b_enc, "b_dec_3": p.b_dec}
    Published("W_enc_3.safetensors", encoder).write(tmp_path)
    Published("W_dec_3.safetensors", {"W_dec_3": torch.zeros(M, 2, D)}).write(tmp_path)
    for path in (tmp_path, tmp_path / "W_enc_3.safetensors", tmp_path / "W_dec_3.safetensors"):
        with pytest.raises(ValueError, match=r"must be a transcoder of one layer, got a cross-layer"):
            formats.load(path)
