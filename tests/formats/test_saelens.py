"""SAELens's layout: each architecture, what is folded, what is refused, and back again."""

from pathlib import Path

import layouts
import pytest
import torch
from autoencoders import D, K, M, make, scrambled, tokens
from layouts import check, largest, parameters, saelens, scores

from fastsparse import formats
from fastsparse.nn import BatchTopKSAE, GatedSAE, JumpReLUSAE, MatchingPursuitSAE, ReLUSAE, TopKSAE

DTYPES = [torch.float64, torch.float32]


def x_of(dtype: torch.dtype) -> torch.Tensor:
    return tokens(50, D, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centered", [True, False])
def test_standard(tmp_path: Path, dtype: torch.dtype, centered: bool) -> None:
    folder = saelens("standard", dtype, apply_b_dec_to_input=centered).write(tmp_path)
    sae, p, x = formats.load(folder), parameters(dtype), x_of(dtype)
    assert type(sae) is ReLUSAE
    assert not sae.training
    code = scores(p, x, centered=centered).relu()
    check(sae, x, code, code @ p.W_dec + p.b_dec)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_topk(tmp_path: Path, architecture: str, rescale: bool, centered: bool, dtype: torch.dtype) -> None:
    options = {"rescale_acts_by_decoder_norm": rescale, "apply_b_dec_to_input": centered}
    sae = formats.load(saelens(architecture, dtype, **options).write(tmp_path))
    p, x = parameters(dtype), x_of(dtype)
    norms = p.W_dec.norm(dim=1) if rescale else torch.ones(M, dtype=dtype)
    z = scores(p, x, centered=centered) * norms
    code = z * (largest(z.abs(), K) > 0) if architecture == "abstopk" else largest(z.relu(), K)
    assert type(sae) is TopKSAE
    assert sae.unit_norm == rescale  # what its atoms have
    check(sae, x, code, (code / norms) @ p.W_dec + p.b_dec)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("logarithm", [True, False])
def test_jump_relu_keeps_no_score_below_0(
    tmp_path: Path, logarithm: bool, centered: bool, dtype: torch.dtype
) -> None:
    p, x = parameters(dtype), x_of(dtype)
    published = saelens("jumprelu", dtype, apply_b_dec_to_input=centered)
    if logarithm:  # of checkpoints before 6.50
        p.threshold = p.threshold.abs()
        published = published.holding(threshold=None, log_threshold=p.threshold.log())
    sae = formats.load(published.write(tmp_path))
    assert type(sae) is JumpReLUSAE
    assert not sae.learn_threshold
    z = scores(p, x, centered=centered)
    code = z.relu() * (z > p.threshold)
    check(sae, x, code, code @ p.W_dec + p.b_dec)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centered", [True, False])
def test_gated(tmp_path: Path, centered: bool, dtype: torch.dtype) -> None:
    sae = formats.load(saelens("gated", dtype, apply_b_dec_to_input=centered).write(tmp_path))
    p, x = parameters(dtype), x_of(dtype)
    assert type(sae) is GatedSAE
    u = scores(p, x, centered=centered) - p.b_enc
    code = (u + p.b_enc > 0) * (u * p.r_mag.exp() + p.b_mag).relu()
    check(sae, x, code, code @ p.W_dec + p.b_dec)


@pytest.mark.parametrize("rescale", [True, False])
def test_batch_topk_that_is_still_in_training(tmp_path: Path, rescale: bool) -> None:
    published = saelens("batchtopk", torch.float64, k=K + 0.5, rescale_acts_by_decoder_norm=rescale)
    sae, p, x = formats.load(published.write(tmp_path)), parameters(), x_of(torch.float64)
    norms = p.W_dec.norm(dim=1) if rescale else torch.ones(M, dtype=torch.float64)
    z = scores(p, x, centered=True).relu() * norms
    assert type(sae) is BatchTopKSAE
    assert sae.k == K + 0.5
    code = z * (z > 0.5)
    check(sae, x, code, (code / norms) @ p.W_dec + p.b_dec)
    batch = largest(z.flatten(), int((K + 0.5) * len(x))).view_as(z)
    torch.testing.assert_close(sae.train().encode(x).code.to_dense(M), batch)


def test_matryoshka_has_prefixes(tmp_path: Path) -> None:
    published = saelens("matryoshka_batchtopk", k=float(K), matryoshka_widths=[10, 20, M])
    assert formats.load(published.write(tmp_path)).prefixes == (10, 20)


def test_what_was_written_before_version_6(tmp_path: Path) -> None:
    """A standard one with another activation, no architecture, and a factor that is 1."""
    old = saelens("topk", torch.float64).holding(scaling_factor=torch.ones(M))
    options = {"d_in": D, "d_sae": M, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    options |= {"normalize_activations": False, "finetuning_scaling_factor": None, "hook_point": "x"}
    sae, p, x = formats.load(old._replace(options=options).write(tmp_path)), parameters(), x_of(torch.float64)
    code = largest(scores(p, x, centered=True), K).relu()
    check(sae, x, code, code @ p.W_dec + p.b_dec)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"normalize_activations": "layer_norm"}, 'normalize_activations must be "none" or false, got "la'),
        ({"normalize_activations": True}, 'normalize_activations must be "none" or false, got true'),
        ({"reshape_activations": "z"}, 'reshape_activations must be "none" or "hook_z", got "z"'),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor must be false, got true"),
        ({"activation_fn": "tanh-relu"}, 'activation_fn must be "relu" or "topk", got "tanh-relu"'),
        ({"architecture": "transcoder"}, 'architecture must be "standard" or .*, got "transcoder"'),
        ({"architecture": "temporal"}, 'architecture must be "standard" or .*, got "temporal"'),
        ({"apply_b_dec_to_input": "no"}, 'apply_b_dec_to_input must be of type bool, got "no"'),
        ({"k": 4.0}, "k must be of type int, got 4.0"),
        ({"k": M + 1}, f"TopKSAE: k must be at most num_latents .{M}., got k={M + 1}"),
        ({"k": None}, "must say activation_fn_kwargs, it says architecture, "),
        ({"d_sae": None}, "must say d_sae, it says architecture, "),
        ({"d_sae": M + 1}, rf"W_enc must have shape \(D, M\) = \({D}, {M + 1}\), got \({D}, {M}\)"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(tmp_path: Path, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{tmp_path}/.*: {said}"):
        formats.load(saelens(**options).write(tmp_path))


def test_factors_of_latents_are_refused(tmp_path: Path) -> None:
    published = saelens().holding(scaling_factor=torch.full((M,), 2.0))
    with pytest.raises(ValueError, match=r"scaling_factor must be 1 of every latent, or absent, got others"):
        formats.load(published.write(tmp_path))


def test_no_atom_is_zero_where_norms_scale(tmp_path: Path) -> None:
    atoms = parameters(torch.float32).W_dec.index_fill(0, torch.tensor([7]), 0)
    published = saelens(rescale_acts_by_decoder_norm=True).holding(W_dec=atoms)
    with pytest.raises(ValueError, match=r"atoms whose norms scale their scores must not be zero, 7 is"):
        formats.load(published.write(tmp_path))


def test_activations_that_the_caller_normalises(tmp_path: Path) -> None:
    published = saelens("standard", torch.float64, normalize_activations="layer_norm")
    sae, p = formats.load(published.write(tmp_path), normalized=True), parameters()
    x = x_of(torch.float64)
    x = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
    code = scores(p, x, centered=True).relu()
    check(sae, x, code, code @ p.W_dec + p.b_dec)


def test_what_is_folded_into_bfloat16_is_kept_in_float32(tmp_path: Path) -> None:
    plain = saelens("jumprelu", torch.bfloat16)
    assert formats.load(plain.write(tmp_path / "a")).W_enc.dtype == torch.bfloat16
    folder = plain.but(apply_b_dec_to_input=False).write(tmp_path / "b")
    sae = formats.load(folder)
    assert {tensor.dtype for tensor in sae.parameters()} == {torch.float32}
    p = parameters(torch.bfloat16)
    x = x_of(torch.float32)
    z = x.double() @ p.W_enc.double().T + p.b_enc.double()
    code = (z.relu() * (z > p.threshold)).float()
    check(sae, x, code, (code.double() @ p.W_dec.double() + p.b_dec).float())
    assert formats.load(folder, dtype=torch.bfloat16).W_enc.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", [TopKSAE, JumpReLUSAE, GatedSAE, ReLUSAE])
def test_there_and_back(tmp_path: Path, kind: type, dtype: torch.dtype) -> None:
    sae, x = scrambled(kind).to(dtype).eval(), x_of(dtype)
    formats.save(sae, tmp_path, format="saelens")
    again = kind.from_pretrained(tmp_path)
    for name, parameter in sae.named_parameters():
        if name != "raw_threshold":
            assert torch.equal(getattr(again, name), parameter), name
    if kind is JumpReLUSAE:
        assert torch.equal(again.threshold, sae.threshold)
    assert torch.equal(again(x), sae(x))
    formats.save(again, tmp_path / "second", format="saelens")
    first, second = tmp_path / "sae_weights.safetensors", tmp_path / "second" / "sae_weights.safetensors"
    assert first.read_bytes() == second.read_bytes()


def test_absolute_values_and_batches_there_and_back(tmp_path: Path) -> None:
    sae, x = scrambled(TopKSAE, activation="abs"), x_of(torch.float64)
    formats.save(sae, tmp_path / "abs", format="saelens")
    assert torch.equal(formats.load(tmp_path / "abs")(x), sae(x))
    batch = scrambled(BatchTopKSAE).eval()
    batch.threshold.fill_(0.7)
    formats.save(batch, tmp_path / "batch", format="saelens")
    again = formats.load(tmp_path / "batch")
    assert type(again) is JumpReLUSAE  # as it is published there
    torch.testing.assert_close(again(x), batch(x))


def test_what_has_no_place_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^save: saelens has no place for a MatchingPursuitSAE"):
        formats.save(make(MatchingPursuitSAE), tmp_path / "a", format="saelens")
    with pytest.raises(ValueError, match=r"^save: groups must be 1 in saelens, got 2"):
        formats.save(make(TopKSAE, groups=2), tmp_path / "a", format="saelens")
    with pytest.raises(RuntimeError, match=r"threshold must be known, got 0"):
        formats.save(make(BatchTopKSAE), tmp_path / "a", format="saelens")
    negative = layouts.circuit_tracer(threshold=True).write(tmp_path / "b")
    with pytest.raises(ValueError, match=r"^save: thresholds must be at least 0 in saelens"):
        formats.save(formats.load(negative), tmp_path / "a", format="saelens")
    assert not (tmp_path / "a").exists()
