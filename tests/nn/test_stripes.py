"""Dense codes in stripes: what entries of ragged codes make of the same tokens, and when which is taken."""

import pytest
import torch
from autoencoders import OPTIONS, D, K, M, gradients, make, scrambled, textbook_loss, tokens
from torch.utils.checkpoint import checkpoint

import fastsparse
from fastsparse.nn import Firings, JumpReLUSAE, _elementwise, _stripes

pytestmark = pytest.mark.parametrize("kind", list(OPTIONS))


@pytest.fixture(autouse=True)
def narrow_stripes(monkeypatch) -> None:
    monkeypatch.setattr(_stripes, "_WIDTH", 7)


@pytest.mark.parametrize("prefixes", [(), (3, 17)])
@pytest.mark.parametrize("dense", ["sparse", "stripes"])
def test_loss_and_gradients_are_the_textbooks(kind: type, dense: str, prefixes: tuple) -> None:
    weights = (0.5, 2.0, 1.5) if prefixes else None
    sae = scrambled(kind, dense=dense, prefixes=prefixes, prefix_weights=weights)
    with torch.no_grad():
        sae.W_dec.mul_(1 + tokens(M, 1, dtype=torch.float64).abs())
    x = tokens(33, D, dtype=torch.float64).requires_grad_()
    out, expected = sae.loss(x), textbook_loss(sae, x)
    assert isinstance(out.code, Firings if dense == "stripes" else fastsparse.Ragged)
    leaves = [x, *sae.parameters()]
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"])
def test_both_tell_the_same(kind: type, dtype: torch.dtype | str) -> None:
    x = tokens(20, D)
    found = []
    for dense in ("sparse", "stripes"):
        sae = make(kind, dense=dense, dead_after=1, aux_k=3)
        sae.tokens_since_fired[:9] = 1
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            if dtype == torch.bfloat16:
                sae, x = sae.to(dtype), x.to(dtype)
            out = sae.loss(x)
        sae.count_firings_(out.code)
        told = out._replace(code=sae.tokens_since_fired, density=torch.tensor(out.density))
        found.append((tuple(told[:-2]), told.code, sae.density, gradients(sae, out.loss)))
        assert out.aux > 0
        assert (sae.density - out.density).abs() < 1e-6
    exact = dtype == torch.float32
    torch.testing.assert_close(*found, **{} if exact else {"atol": 2e-3, "rtol": 0.02})


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_replays_within_a_replay(kind: type, use_reentrant: bool) -> None:
    x, found = tokens(6, D, dtype=torch.float64).requires_grad_(), []
    for replayed in (False, True):
        sae = scrambled(kind, dense="stripes", aux_k=3, dead_after=1)
        sae.tokens_since_fired[::4] = 1
        out = checkpoint(sae.loss, x, use_reentrant=use_reentrant) if replayed else sae.loss(x)
        out[0].backward()
        found.append([parameter.grad for parameter in sae.parameters()])
    assert all(map(torch.equal, *found))


def test_second_derivatives(kind: type) -> None:
    x, found = tokens(6, D, dtype=torch.float64).requires_grad_(), []
    for dense in ("sparse", "stripes"):
        sae = scrambled(kind, dense=dense)
        leaves = [x, *sae.parameters()]
        first = torch.autograd.grad(sae.loss(x).loss, leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(part.square().sum() for part in first), leaves))
    torch.testing.assert_close(*found)


def test_no_matrix_of_all_scores_is_kept(kind: type) -> None:
    """What a loss holds for its gradient, beside parameters: N times a stripe, and not N times M."""
    N, kept = 64, []
    sae = make(kind, d_model=2, num_latents=700, dense="stripes")
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: kept.append(saved) or saved, lambda saved: saved
    ):
        sae.loss(tokens(N, 2)).loss.backward()
    assert max(tensor.numel() for tensor in kept) <= max(7 * N, sae.W_enc.numel())
    assert sum(tensor.numel() for tensor in kept) < N * 700


def test_auto_goes_by_the_last_step_that_was_counted(kind: type, monkeypatch) -> None:
    x, sae = tokens(20, D), make(kind, dense="auto")
    assert sae.density == 1
    first = sae.loss(x)
    assert isinstance(first.code, Firings)
    assert isinstance(sae.loss(x).code, Firings)  # nothing was counted
    sae.count_firings_(first.code)
    assert 0.1 < sae.density < 1
    assert isinstance(sae.loss(x).code, Firings)
    monkeypatch.setattr(_elementwise, "_CROSSOVER", {"cpu": 0.99})
    second = sae.loss(x)
    assert isinstance(second.code, fastsparse.Ragged)
    before = sae.density.clone()
    sae.count_firings_(second.code)
    assert torch.equal(sae.density, before)
    torch.testing.assert_close(second.loss, first.loss)
    sae.count_firings_(fastsparse.TopK(torch.ones(2, K), torch.zeros(2, K, dtype=torch.int64)))
    assert torch.equal(sae.density, before)
    again = make(kind, dense="auto")
    again.load_state_dict(sae.state_dict())
    assert torch.equal(again.to(torch.bfloat16).density, before)
    sae.reset_parameters()
    assert sae.density == 1


def test_the_band_counts_as_entries(kind: type) -> None:
    if kind is JumpReLUSAE:  # of which no score is far from
        sae = make(kind, dense="stripes", bandwidth=100.0)
        assert sae.loss(tokens(20, D)).density == 1
        assert sae.loss(tokens(20, D)).l0 < M


def test_unknown_ways(kind: type) -> None:
    with pytest.raises(ValueError, match=f"^{kind.__name__}: dense must be one of auto, .*, got 'x'"):
        make(kind, dense="x")
