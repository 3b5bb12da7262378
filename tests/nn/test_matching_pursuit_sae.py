"""What MatchingPursuitSAE alone does, and the life of its atoms."""

import itertools
from functools import partial

import autoencoders
import pytest
import torch
from autoencoders import D, K, textbook_pursuit, tokens

import fastsparse
from fastsparse._validation import UNIT_NORM_TOLERANCE
from fastsparse.nn import MatchingPursuitSAE

make, scrambled = (
    partial(build, MatchingPursuitSAE) for build in (autoencoders.make, autoencoders.scrambled)
)


def test_more_steps_leave_less() -> None:
    """Nested codes, an error that falls with every step, and rows that stop on their own at a tolerance."""
    sae, x = scrambled(), tokens(50, D, dtype=torch.float64)
    codes = [sae.encode(x, k=k) for k in (1, 2, 5, 10, 40)]
    errors = [code.residual.norm(dim=1) for code in codes]
    for fewer, more in itertools.pairwise(codes):
        assert torch.equal(more.indices[:, : fewer.indices.shape[1]], fewer.indices)
    assert all((after < before).all() for before, after in itertools.pairwise(errors))
    settled = sae.encode(x, k=200, tol=0.5)
    steps = (settled.values > 0).sum(dim=1)
    assert (settled.residual.norm(dim=1) <= 0.5).all()
    assert len(steps.unique()) > 3
    assert torch.equal(sae.encode(x).indices, codes[2].indices)


def test_initial_state() -> None:
    sae = make()
    assert [name for name, _ in sae.named_parameters()] == ["W_dec", "b_dec"]
    assert sae.aux_k == K


def test_the_residual_is_what_decoding_leaves() -> None:
    sae, x = scrambled(), tokens(3, 4, D, dtype=torch.float64)
    code = sae.encode(x)
    assert isinstance(code, fastsparse.Pursuit)
    torch.testing.assert_close(sae.decode(code), x - code.residual)


def test_counters_count_tokens_since_an_atom_was_taken() -> None:
    sae = make(d_model=3, num_latents=3, k=2)
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(3))
    sae.count_firings_(sae.encode(torch.tensor([[2.0, 1.0, -1.0], [3.0, -1.0, -2.0]])))
    assert sae.tokens_since_fired.tolist() == [0, 0, 2]
    out = sae.loss(torch.tensor([[3.0, -1.0, -2.0]]))  # the second slot stays unused, with value 0, index 0
    sae.count_firings_(out.code)
    assert sae.tokens_since_fired.tolist() == [0, 1, 3]
    assert out.l0 == 1
    signed = make(d_model=3, num_latents=3, k=2, nonnegative=False)
    with torch.no_grad():
        signed.W_dec.copy_(torch.eye(3))
    signed.count_firings_(signed.encode(torch.tensor([[3.0, -1.0, -2.0]])))
    assert signed.tokens_since_fired.tolist() == [0, 1, 0]


def test_atoms_that_lost_their_norm_are_refused() -> None:
    sae = scrambled()
    with torch.no_grad():
        sae.W_dec[3] *= 1.5
    message = r"atoms of norm 1 \(to 1e-05\), got norm 1.5 at atom 3; normalize_decoder_\(\) gives it to them"
    with pytest.raises(ValueError, match=f"^MatchingPursuitSAE: W_dec must have {message}$"):
        sae(tokens(2, D, dtype=torch.float64))
    sae.normalize_decoder_()
    sae(tokens(2, D, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_atoms_that_were_rounded_to_halves_are_taken_as_they_are(dtype: torch.dtype) -> None:
    half = make(d_model=3, num_latents=500, k=3).to(dtype)
    half.normalize_decoder_()
    sae = make(d_model=3, num_latents=500, k=3)
    sae.load_state_dict(half.state_dict())
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() > UNIT_NORM_TOLERANCE[torch.float32]
    x = tokens(20, 3)
    expected = textbook_pursuit(x, sae.W_dec, 3, nonnegative=True)
    torch.testing.assert_close(sae.encode(x).residual, expected)
    torch.testing.assert_close(half.float().encode(x).residual, expected)
    with torch.no_grad():
        sae.W_dec += 1e-3 * sae.W_dec.sign()  # a step of training without what has to follow it
    with pytest.raises(ValueError, match="normalize_decoder_"):
        sae(x)


def test_bad_arguments() -> None:
    sae, x = make(), tokens(4, D)
    with pytest.raises(TypeError, match=r"^MatchingPursuitSAE: nonnegative must be a bool, got 1"):
        MatchingPursuitSAE(4, 8, 2, nonnegative=1)
    with pytest.raises(ValueError, match="k must be at least 1, got k=0"):
        sae.encode(x, k=0)
    with pytest.raises(ValueError, match="tol must be finite and at least 0, got tol=-1"):
        sae.encode(x, tol=-1.0)
