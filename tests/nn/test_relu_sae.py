"""What ReLUSAE alone does: its penalty, and how that is annealed."""

from functools import partial

import autoencoders
import pytest
import torch
from autoencoders import D, M, gradients, textbook_loss, tokens

from fastsparse.nn import ReLUSAE

make, scrambled = (partial(build, ReLUSAE) for build in (autoencoders.make, autoencoders.scrambled))


@pytest.mark.parametrize("dense", ["sparse", "stripes"])
@pytest.mark.parametrize("p", [1.0, 0.5, 2.0])
def test_loss_and_gradients_are_the_textbooks(p: float, dense: str) -> None:
    sae, x = scrambled(p=p, dense=dense), tokens(33, D, dtype=torch.float64)
    with torch.no_grad():
        sae.W_dec.mul_(1 + tokens(M, 1, dtype=torch.float64).abs())
        sae.W_dec[3] = 0
    out, expected = sae.loss(x), textbook_loss(sae, x)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(gradients(sae, out.loss), gradients(sae, expected))


def test_longer_atoms_do_not_make_it_less() -> None:
    sae, x = scrambled(), tokens(33, D, dtype=torch.float64)
    before = sae.loss(x)
    with torch.no_grad():
        factors = 1 + tokens(M, 1, dtype=torch.float64).abs()
        sae.W_dec.mul_(factors)
        sae.W_enc.div_(factors)
        sae.b_enc.div_(factors.squeeze(1))
    torch.testing.assert_close(sae.loss(x).penalty, before.penalty)
    torch.testing.assert_close(sae.loss(x).loss, before.loss)


@pytest.mark.parametrize("dense", ["sparse", "stripes"])
def test_annealing_keeps_the_scale(dense: str) -> None:
    sae, x = scrambled(p=1.0, dense=dense), tokens(8, 10, D, dtype=torch.float64)
    with torch.no_grad():
        f = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()
    before, l1 = sae.loss(x), sae.l1.clone()
    for p in (0.8, 0.3):
        sae.anneal_p_(p, x)
        assert sae.p == torch.tensor(p)
        torch.testing.assert_close(sae.l1.double(), l1 * f.sum() / f[f > 0].pow(p).sum(), rtol=1e-5, atol=0)
        after = sae.loss(x)
        torch.testing.assert_close(after.penalty, before.penalty, rtol=1e-5, atol=0)
        assert torch.equal(after.fvu, before.fvu)
    again = make(p=1.0, dtype=torch.float64)
    again.load_state_dict(sae.state_dict())
    for name in ("l1", "p"):
        assert torch.equal(again.to(torch.bfloat16).get_buffer(name), sae.get_buffer(name))
    sae.reset_parameters()
    assert (sae.l1, sae.p) == (l1, 1)


def test_annealing_without_active_latents_keeps_l1() -> None:
    sae = make()
    with torch.no_grad():
        sae.b_enc.fill_(-100)
    sae.anneal_p_(0.5, tokens(D))
    assert sae.l1 == torch.tensor(0.01)
    assert sae.p == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0.0}, "p must be above 0, got p=0.0"),
        ({"p": -1.0}, "p must be finite and at least 0, got p=-1.0"),
        ({"l1": -1.0}, "l1 must be finite and at least 0, got -1.0"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^ReLUSAE: {message}"):
        make(**options)


def test_annealing_refuses() -> None:
    with pytest.raises(ValueError, match=r"^ReLUSAE\.anneal_p_: p must be above 0, got p=0.0"):
        make().anneal_p_(0.0, tokens(2, D))
    with pytest.raises(ValueError, match=r"^ReLUSAE\.anneal_p_: x must have shape \(..., D\) with D = 12"):
        make().anneal_p_(0.5, tokens(2, D + 1))
