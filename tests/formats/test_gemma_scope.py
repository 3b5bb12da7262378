"""Gemma Scope's layout."""

from pathlib import Path

import numpy as np
import pytest
import torch
from autoencoders import D, tokens
from layouts import check, gemma_scope, parameters, scores

from fastsparse import formats
from fastsparse.nn import JumpReLUSAE


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_jump_relu(tmp_path: Path, dtype: torch.dtype) -> None:
    sae, p, x = (
        formats.load(gemma_scope(dtype).write(tmp_path)),
        parameters(dtype),
        tokens(50, D, dtype=dtype),
    )
    assert type(sae) is JumpReLUSAE
    z = scores(p, x, centered=False)
    code = (z > p.threshold) * z.relu()
    check(sae, x, code, code @ p.W_dec + p.b_dec)


def test_any_byte_order(tmp_path: Path) -> None:
    arrays = {name: tensor.numpy().astype(">f4") for name, tensor in gemma_scope().tensors.items()}
    np.savez(tmp_path / "params.npz", **arrays)
    there = formats.load(gemma_scope().write(tmp_path / "other"))
    assert torch.equal(formats.load(tmp_path).W_enc, there.W_enc)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "params.npz", W_enc=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"params.npz: must be an .npz file of numbers; got pickles, or"):
        formats.load(tmp_path)


def test_numbers_that_are_none(tmp_path: Path) -> None:
    arrays = gemma_scope().tensors | {"b_enc": np.array(["a"])}
    np.savez(tmp_path / "params.npz", **arrays)
    with pytest.raises(ValueError, match=r"params.npz: b_enc must be floating, got <U1"):
        formats.load(tmp_path)
