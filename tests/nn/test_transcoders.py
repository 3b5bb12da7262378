"""Transcoders, crosscoders and cross-layer transcoders against what their papers write, dense."""

import pytest
import torch
from autoencoders import D, K, M, tokens
from composites import JUMP, Case, L
from torch import Tensor

from fastsparse.nn import (
    BatchTopKSAE,
    Crosscoder,
    CrossLayerTranscoder,
    JumpReLUSAE,
    Model,
    TopKSAE,
    Transcoder,
    fvu,
)

ENCODERS = {"topk": TopKSAE, "batchtopk": BatchTopKSAE, "jumprelu": JumpReLUSAE}


def kept(scores: Tensor, count: int) -> Tensor:
    """The largest scores of every row, rectified, else 0."""
    chosen = scores.detach().topk(count, dim=-1).indices
    return torch.zeros_like(scores).scatter(-1, chosen, 1) * scores.relu()


def assert_same_gradients(model: Model, ours: Tensor, dense: Tensor) -> None:
    assert torch.allclose(ours, dense)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found, wanted = (torch.autograd.grad(loss, list(trained.values())) for loss in (ours, dense))
    for name, mine, expected in zip(trained, found, wanted, strict=True):
        assert torch.allclose(mine, expected), name


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_is_what_it_says(skip: bool) -> None:
    case = Case(Transcoder, {"skip": skip})
    model, (x, y) = case.scrambled(), case.batch()
    (coder,) = model.coders
    z = kept(x @ coder.W_enc.T + coder.b_enc, K)
    outputs = z @ coder.W_dec + coder.b_dec + (x @ model.W_skip.T if skip else 0)
    assert torch.allclose(model.encode(x).to_dense(M), z)
    assert torch.allclose(model(x), outputs)
    assert_same_gradients(model, model.loss(x, y).loss, fvu(outputs, y))


@pytest.mark.parametrize(
    "options",
    [
        {"encoder": "topk", "k": K, "prefixes": (8, 20), "dead_after": 1},
        {"encoder": "topk", "k": K, "budgets": (K, 9), "activation": "abs"},
        {"encoder": "topk", "k": 2, "groups": 4, "decoder": "polynomial", "ranks": (5, 4, 2)},
        {"encoder": "batchtopk", "k": 3.3},
        {**JUMP, "penalty": "quadratic", "target_l0": 3.0, "aux_k": 4, "dead_after": 1},
        {**JUMP, "penalty": "tanh", "pre_act_weight": 0.1, "unit_norm": False, "dense": "stripes"},
    ],
)
@pytest.mark.parametrize("kind", [Transcoder, Crosscoder])
def test_of_one_place_to_itself_it_is_the_autoencoder(kind: type, options: dict) -> None:
    sizes = {"d_in": D, "d_out": D} if kind is Transcoder else {"d_model": D, "num_sources": 1}
    model = kind(**sizes, num_latents=M, **options, dtype=torch.float64)
    own = {name: value for name, value in options.items() if name != "encoder"}
    sae = ENCODERS[options["encoder"]](D, M, **own, dtype=torch.float64)
    sae.load_state_dict(model.coders[0].state_dict())
    x = tokens(20, D, dtype=torch.float64)
    batch = (x, x) if kind is Transcoder else (x.unsqueeze(1),)
    for _ in range(2):  # the second time with latents that are dead
        ours, expected = model.loss(*batch), sae.loss(x)
        assert torch.equal(ours.loss, expected.loss)
        assert ours.num_dead == expected.num_dead
        model.count_firings_(ours.code)
        sae.count_firings_(expected.code)
    found = torch.autograd.grad(ours.loss, list(model.coders[0].parameters()))
    wanted = torch.autograd.grad(expected.loss, list(sae.parameters()))
    for (name, _), mine, theirs in zip(sae.named_parameters(), found, wanted, strict=True):
        # A transcoder's encoder doesn't see the decoder's bias, which is 0 here.
        assert torch.allclose(mine, theirs) or (kind is Transcoder and name == "b_dec"), name


def test_a_crosscoder_sums_scores_over_sources_and_writes_to_all() -> None:
    case = Case(Crosscoder, {})
    model, (x,) = case.scrambled(), case.batch()
    (coder,) = model.coders
    W_enc, W_dec, b_dec = (part.unflatten(-1, (L, D)) for part in (coder.W_enc, coder.W_dec, coder.b_dec))
    assert torch.equal(model.atoms, W_dec)
    z = kept(sum((x[:, s] - b_dec[s]) @ W_enc[:, s].T for s in range(L)) + coder.b_enc, K)
    outputs = torch.stack([z @ W_dec[:, s] + b_dec[s] for s in range(L)], dim=1)
    assert torch.allclose(model(x), outputs)
    assert_same_gradients(model, model.loss(x).loss, fvu(outputs.flatten(1), x.flatten(1)))


def test_a_crosscoders_penalty_weighs_latents_by_the_sum_of_the_norms_of_their_parts() -> None:
    case = Case(Crosscoder, {**JUMP, "penalty": "tanh", "tanh_scale": 0.5, "unit_norm": False})
    model, (x,) = case.scrambled(), case.batch()
    z = model.encode(x).to_dense(M)
    norms = model.atoms.norm(dim=2).sum(dim=1)
    assert torch.allclose(model.loss(x).penalty, 0.01 * torch.tanh(0.5 * z * norms).sum(dim=1).mean())


def layer_scores(model: CrossLayerTranscoder, x: Tensor) -> Tensor:
    """(N, L, M)."""
    return torch.stack([x[:, s] @ c.W_enc.T + c.b_enc for s, c in enumerate(model.coders)], dim=1)


def layer_outputs(model: CrossLayerTranscoder, z: Tensor) -> Tensor:
    """(N, L, D): to each layer of all layers up to it."""
    parts = [coder.W_dec.unflatten(1, (-1, D)) for coder in model.coders]
    bias = model.coders[0].b_dec.unflatten(0, (L, D))
    return torch.stack(
        [sum(z[:, s] @ parts[s][:, t - s] for s in range(t + 1)) + bias[t] for t in range(L)], dim=1
    )


@pytest.mark.parametrize("encoder", ["topk", "batchtopk"])
def test_a_cross_layer_transcoder_chooses_among_all_layers(encoder: str) -> None:
    case = Case(CrossLayerTranscoder, {"encoder": encoder})
    model, (x, y) = case.scrambled(), case.batch()
    scores = layer_scores(model, x)
    z = kept(scores.flatten(1), K) if encoder == "topk" else kept(scores.flatten(), K * len(x))
    z = z.reshape(scores.shape)
    codes = model.encode(x)
    for layer, code in enumerate(codes):
        assert torch.allclose(code.to_dense(M) if encoder == "topk" else code.code.to_dense(M), z[:, layer])
    outputs = layer_outputs(model, z)
    assert torch.allclose(model(x), outputs)
    out = model.loss(x, y)
    assert_same_gradients(model, out.loss, fvu(outputs.flatten(1), y.flatten(1)))
    assert torch.isclose(out.l0, (z > 0).sum() / len(x))
    assert out.density == K / (L * M)


def test_ties_go_to_the_first_layer_and_then_to_the_lowest_latent() -> None:
    model = Case(CrossLayerTranscoder, {"k": 4}).make()
    with torch.no_grad():
        for coder in model.coders:
            coder.W_enc.zero_()
            coder.b_enc.fill_(1)
        model.coders[1].b_enc[5] = 2
    codes = model.encode(torch.zeros(2, L, D))
    assert [code.indices.tolist() for code in codes] == [[0, 1, 2] * 2, [5] * 2, []]
    assert [code.offsets.tolist() for code in codes] == [[0, 3, 6], [0, 1, 2], [0, 0, 0]]


def test_layers_have_one_threshold_after_training() -> None:
    case = Case(CrossLayerTranscoder, {"encoder": "batchtopk"})
    model, (x, y) = case.scrambled(), case.batch()
    out = model.loss(x, y)
    model.count_firings_(out.code)
    least = torch.cat([code.values for code in out.code])
    thresholds = {coder.threshold.item() for coder in model.coders}
    assert thresholds == {least[least > 0].min().float().item()}
    z = layer_scores(model, x)
    z = torch.where(z > thresholds.pop(), z, 0)
    assert torch.allclose(model.eval()(x), layer_outputs(model, z))


def test_a_cross_layer_transcoder_of_jumps() -> None:
    case = Case(CrossLayerTranscoder, {**JUMP, "dense": "sparse"})
    model, (x, y) = case.scrambled(), case.batch()
    scores = layer_scores(model, x)
    z = torch.where(scores > torch.stack([coder.threshold for coder in model.coders]), scores, 0)
    outputs = layer_outputs(model, z)
    out = model.loss(x, y)
    assert torch.allclose(out.fvu, fvu(outputs.flatten(1), y.flatten(1)))
    assert torch.isclose(out.penalty.float(), 0.01 * (z != 0).sum() / len(x))
    assert torch.allclose(model(x), outputs)


@pytest.mark.parametrize("kind", [Transcoder, CrossLayerTranscoder])
def test_pairs_must_belong_together(kind: type) -> None:
    case = Case(kind, {"skip": True} if kind is Transcoder else {})
    model, (x, y) = case.make(), case.batch(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^\w+(\.loss)?: .*y must hold"):
        model.loss(x, y[1:])
    with pytest.raises(ValueError, match="y must have shape"):
        model.loss(x, y[..., :2])
    if kind is Transcoder:
        with pytest.raises(TypeError, match=r"^Transcoder.decode: x must be given for the skip connection"):
            model.decode(model.encode(x))


@pytest.mark.parametrize(
    ("kind", "inputs", "targets", "sizes"),
    [
        (Transcoder, (5,), (7,), {"d_in": 5, "d_out": 7}),
        (Transcoder, (5,), None, None),
        (Transcoder, (2, 5), (7,), None),
        (Crosscoder, (2, 5), None, {"d_model": 5, "num_sources": 2}),
        (Crosscoder, (5,), None, None),
        (Crosscoder, (2, 5), (2, 5), None),
        (CrossLayerTranscoder, (2, 5), (2, 5), {"d_model": 5, "num_layers": 2}),
        (CrossLayerTranscoder, (2, 5), (2, 6), None),
        (CrossLayerTranscoder, (2, 5), None, None),
    ],
)
def test_sizes_of_tokens(kind: type, inputs: tuple, targets: tuple | None, sizes: dict | None) -> None:
    if sizes is None:
        with pytest.raises(ValueError, match=f"^{kind.__name__} .* got rows of shape"):
            kind.sizes_of(inputs, targets)
    else:
        assert kind.sizes_of(inputs, targets) == sizes


def test_options_that_a_cross_layer_transcoder_has_not() -> None:
    with pytest.raises(TypeError, match=r"^CrossLayerTranscoder has no option groups, got 2"):
        CrossLayerTranscoder(D, M, K, num_layers=2, groups=2)
