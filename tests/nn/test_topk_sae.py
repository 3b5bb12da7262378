"""What TopKSAE alone does, and the life of its latents."""

from functools import partial

import autoencoders
import pytest
import torch
from autoencoders import D, tokens

import fastsparse
from fastsparse.nn import TopKSAE

make = partial(autoencoders.make, TopKSAE)


def test_initial_state() -> None:
    sae = make()
    assert isinstance(sae.encode(tokens(2, D)), fastsparse.TopK)
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert not sae.b_enc.any()


@pytest.mark.parametrize(
    ("d_model", "aux_k"), [(1, 1), (2, 1), (384, 256), (512, 256), (768, 512), (4096, 2048)]
)
def test_default_aux_k_is_the_power_of_two_nearest_half_the_width(d_model: int, aux_k: int) -> None:
    # log2(384 / 2) = 7.58 is nearer to 8 than to 7.
    assert TopKSAE(d_model, 4, 1).aux_k == aux_k


def test_perfect_reconstruction_with_dead_latents_is_finite() -> None:
    sae = make(d_model=3, num_latents=5, k=2, dead_after=1)
    with torch.no_grad():
        sae.W_enc[:3] = sae.W_dec[:3] = torch.eye(3)
    sae.tokens_since_fired[3:] = 1
    out = sae.loss(torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
    assert out.num_dead == 2
    out.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in sae.parameters())


def test_more_active_latents_than_latents_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^TopKSAE: k must be at most num_latents \(8\), got k=9"):
        TopKSAE(4, 8, 9)
