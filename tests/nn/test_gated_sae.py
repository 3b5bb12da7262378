"""What GatedSAE alone does: gates and magnitudes, and the thresholds that they are."""

from functools import partial

import autoencoders
import pytest
import torch
from autoencoders import D, M, tokens

from fastsparse.nn import GatedSAE, JumpReLUSAE

make, scrambled = (partial(build, GatedSAE) for build in (autoencoders.make, autoencoders.scrambled))


def test_initial_state() -> None:
    """Gates and magnitudes are the same scores."""
    sae, x = make(), tokens(20, D)
    dense = ((x - sae.b_dec) @ sae.W_enc.T).relu()
    torch.testing.assert_close(sae.encode(x).to_dense(M), dense)
    assert {name for name, _ in sae.named_parameters()} >= {"r_mag", "b_mag"}
    with torch.no_grad():
        sae.r_mag += 1
        sae.b_mag += 1
    sae.reset_parameters()
    assert not sae.r_mag.any()
    assert not sae.b_mag.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_exported_thresholds_are_the_gates(dtype: torch.dtype) -> None:
    """Those below 0 too, where it is the magnitude that decides."""
    sae, x = scrambled(prefixes=(5,)).to(dtype), tokens(200, D, dtype=dtype)
    exported = sae.export_threshold()
    assert isinstance(exported, JumpReLUSAE)
    unclamped = sae.b_mag - sae.r_mag.exp() * sae.b_enc
    assert (unclamped < -0.1).any()
    assert (unclamped > 0.1).any()
    assert exported.prefixes == (5,)
    if dtype == torch.float64:
        torch.testing.assert_close(exported(x), sae(x))
        torch.testing.assert_close(exported.encode(x).to_dense(M), sae.encode(x).to_dense(M))
    else:  # rounded once more
        assert (exported(x) - sae(x)).float().norm() < 0.02 * sae(x).float().norm()
    assert (sae.encode(x).values == 0).any()  # gates of which the magnitude is none
    assert exported.encode(x).values.all()


def test_only_gates_are_penalised() -> None:
    """The larger r_mag, the larger the values; the penalty stays."""
    sae, x = make(), tokens(20, D)
    before = sae.loss(x)
    with torch.no_grad():
        sae.r_mag += 1
    after = sae.loss(x)
    assert torch.equal(after.penalty, before.penalty)
    torch.testing.assert_close(after.code.values, torch.e * before.code.values)


@pytest.mark.parametrize("l1", [-0.1, float("inf")])
def test_refusals(l1: float) -> None:
    with pytest.raises(ValueError, match=f"^GatedSAE: l1 must be finite and at least 0, got {l1}"):
        make(l1=l1)
