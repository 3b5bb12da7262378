"""Models made of coders: what they all do. What each computes has a file of its own."""

import pytest
import torch
from composites import CASES, Case, L

from fastsparse import formats
from fastsparse.nn import Crosscoder, CrossLayerTranscoder, GroupSparseSAE, Model, SAELoss, Transcoder

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def train(model: Model, batch: tuple[torch.Tensor, ...], steps: int) -> SAELoss:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        out = model.loss(*batch)
        out.loss.backward()
        model.after_backward_()
        optimizer.step()
        model.after_step_()
        model.count_firings_(out.code)
    return out


@cases
def test_it_learns(case: Case) -> None:
    model, batch = case.make(), case.batch(64, torch.float32)
    model.init_decoder_bias_(*batch)
    first = model.loss(*batch)
    last = train(model, batch, 60)
    assert last.loss < 0.8 * first.loss
    assert last.fvu < min(first.fvu, 1)
    model.eval()
    assert model(batch[0]).shape == batch[-1].shape
    assert torch.allclose(model.decode(*coded(model, batch[0])).reshape(batch[-1].shape), model(batch[0]))


def coded(model: Model, x: torch.Tensor) -> tuple:
    return (model.encode(x), x) if getattr(model, "skip", False) else (model.encode(x),)


@cases
def test_every_parameter_learns(case: Case) -> None:
    model = case.scrambled()
    model.loss(*case.batch()).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all()
    later = {f"coders.{layer}.b_dec" for layer in range(1, L)}
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert fixed == (later if case.kind is CrossLayerTranscoder else set())


@cases
def test_leading_dimensions_are_tokens(case: Case) -> None:
    model, batch = case.scrambled(), case.batch(20)
    stacked = [part.reshape(4, 5, *part.shape[1:]) for part in batch]
    assert torch.equal(model.loss(*stacked).loss, model.loss(*batch).loss)
    model.count_firings_(model.loss(*batch).code)
    model.eval()
    assert torch.equal(model(stacked[0]).flatten(0, 1), model(batch[0]))


@cases
def test_all_comes_back(case: Case, tmp_path) -> None:
    model = case.scrambled()
    model.count_firings_(model.loss(*case.batch()).code)
    model.eval().save_pretrained(tmp_path)
    again = formats.load(tmp_path)
    assert type(again) is case.kind
    assert again.options() == model.options()
    assert repr(again) == repr(model)
    found, wanted = again.state_dict(), model.state_dict()
    assert list(found) == list(wanted)
    assert all(
        torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in wanted
    )
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    assert torch.equal(again(case.batch()[0]), model(case.batch()[0]))
    with pytest.raises(ValueError, match=r"^save: model must be an autoencoder in saelens, got "):
        model.save_pretrained(tmp_path / "other", format="saelens")


@cases
def test_options_are_the_constructors(case: Case) -> None:
    model = case.make()
    assert case.kind(**model.options()).options() == model.options()
    assert {"device", "dtype", "generator"}.isdisjoint(model.options())


@cases
def test_latents_die_and_come_back(case: Case) -> None:
    model = case.scrambled()
    batch = case.batch()
    number = len(model.coders)
    shape = (model.num_latents,) if number == 1 else (number, model.num_latents)
    assert model.dead.shape == model.tokens_since_fired.shape == shape
    model.count_firings_(model.loss(*batch).code)
    assert set(model.tokens_since_fired.unique().tolist()) <= {0, 20}
    assert (model.tokens_since_fired == 0).any()
    model.reset_parameters()
    assert not model.tokens_since_fired.any()


@pytest.mark.parametrize("encoder", ["topk", "batchtopk"])
@pytest.mark.parametrize("kind", [Transcoder, Crosscoder])
def test_dead_latents_are_revived(kind: type, encoder: str) -> None:
    case = Case(kind, {"encoder": encoder, "dead_after": 1})
    model, batch = case.scrambled(), case.batch(4)
    model.count_firings_(model.loss(*batch).code)
    out = model.loss(*batch)
    assert out.num_dead == int(model.dead.sum()) > 0
    assert out.aux > 0
    assert torch.isclose(out.loss.detach(), out.fvu + out.aux / 32)


@pytest.mark.parametrize("kind", [Transcoder, Crosscoder, CrossLayerTranscoder, GroupSparseSAE])
def test_autocast_and_half_precision(kind: type) -> None:
    case = Case(kind, {})
    model, batch = case.make(), case.batch(64, torch.float32)
    expected = model.loss(*batch)
    with torch.autocast("cpu", torch.bfloat16):
        out = model.loss(*batch)
    assert torch.isclose(out.loss, expected.loss, rtol=0.05)
    halves = model.bfloat16().loss(*(part.bfloat16() for part in batch))
    assert torch.isclose(halves.loss.float(), expected.loss, rtol=0.05)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"k": None}, ValueError, "k must be given with encoder='topk', got None"),
        ({"encoder": "mp"}, ValueError, "encoder must be one of topk, batchtopk, jumprelu, got 'mp'"),
        ({"encoder": "jumprelu", "k": 3}, ValueError, "k must be left out with encoder='jumprelu', got 3"),
        ({"threshold": 0.3}, ValueError, "threshold must be left out with encoder='topk', got 0.3"),
        ({"k": 2.5}, TypeError, "k must be an int, got 2.5 of type float"),
        ({"k": 41}, ValueError, r"k must be at most num_latents \(40\), got k=41"),
    ],
)
@pytest.mark.parametrize("kind", [Transcoder, Crosscoder, CrossLayerTranscoder])
def test_options_that_are_refused(kind: type, options: dict, error: type, said: str) -> None:
    with pytest.raises(error, match=f"^{kind.__name__}: {said}$"):
        Case(kind, options).make()


@pytest.mark.parametrize("kind", [Crosscoder, CrossLayerTranscoder, GroupSparseSAE])
def test_shapes_that_are_refused(kind: type) -> None:
    case = Case(kind, {})
    model, (x, *others) = case.make(), case.batch(dtype=torch.float32)
    for wrong in (x[:, 0], x[:, :2], x[..., :3]):
        with pytest.raises(
            ValueError, match=rf"^{kind.__name__}.encode: x must have shape \(..., num_\w+, D\)"
        ):
            model.encode(wrong)
        with pytest.raises(ValueError, match=rf"^{kind.__name__}.loss: x must have shape"):
            model.loss(wrong, *others)
    with pytest.raises(ValueError, match="at least one"):
        model.loss(x[:0], *(part[:0] for part in others))
    with pytest.raises(TypeError, match=rf"^{kind.__name__}.loss: x must be"):
        model.loss(x.int(), *others)
