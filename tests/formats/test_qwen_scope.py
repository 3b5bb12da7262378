"""Qwen-Scope's layout, which says k by the name of its folder alone."""

from pathlib import Path

import pytest
import torch
from autoencoders import D, K, tokens
from layouts import check, largest, parameters, qwen_scope, scores

from fastsparse import formats
from fastsparse.nn import TopKSAE


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_topk(tmp_path: Path, dtype: torch.dtype) -> None:
    published = qwen_scope(dtype)
    sae = formats.load(published.write(tmp_path) / published.weights)
    p, x = parameters(dtype), tokens(50, D, dtype=dtype)
    z = scores(p, x, centered=False)
    code = largest(z, K)
    code = code * (code > 0)
    assert type(sae) is TopKSAE
    check(sae, x, code, code @ p.W_dec + p.b_dec)


def test_k_is_said_or_must_be(tmp_path: Path) -> None:
    published = qwen_scope()._replace(weights="layer3.sae.pt")
    cached = tmp_path / "models--Qwen--SAE-Res-Qwen3-8B-Base-W64K-L0_7" / "snapshots" / "abc"
    assert formats.load(published.write(cached)).k == 7
    assert formats.load(cached, k=7).k == 7
    path = published.write(tmp_path / "layers") / "layer3.sae.pt"
    with pytest.raises(ValueError, match=r"layer3.sae.pt: k must be given, as neither the file says it nor"):
        formats.load(path)
    assert TopKSAE.from_pretrained(path, k=9).k == 9


def test_one_of_several_layers_must_be_named(tmp_path: Path) -> None:
    for layer in (3, 4):
        qwen_scope()._replace(weights=f"layer{layer}.sae.pt").write(tmp_path)
    with pytest.raises(
        ValueError, match=r"holds 2 autoencoders, name one file: layer3.sae.pt, layer4.sae.pt"
    ):
        formats.load(tmp_path)
    assert formats.load(tmp_path / "layer4.sae.pt", k=3).k == 3
