"""Files that the libraries write themselves, read here; and files that are written here, read by them.

Needs the environment of ``make bench-peers``, with pytest in it.
"""

import contextlib
import importlib.util
import io
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from autoencoders import D, K, M, scrambled, tokens
from torch import nn

from fastsparse import formats
from fastsparse.nn import BatchTopKSAE, GatedSAE, JumpReLUSAE, ReLUSAE, SparseAutoencoder, TopKSAE

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
X = tokens(64, D, dtype=torch.float64, seed=40)


@pytest.fixture(scope="module")
def sae_lens():
    return pytest.importorskip("sae_lens", reason="SAELens is not installed: make bench-peers does it")


@pytest.fixture(scope="module")
def sparsify():
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its documented switch, read at import
    with contextlib.redirect_stdout(io.StringIO()):  # it prints which decoder it chose
        return pytest.importorskip("sparsify", reason="sparsify is not installed: make bench-peers does it")


@pytest.fixture(scope="module")
def dictionary_learning():
    if importlib.util.find_spec("dictionary_learning") is None:
        pytest.skip("dictionary_learning is not installed: make bench-peers does it")
    if "nnsight" not in sys.modules and importlib.util.find_spec("nnsight") is None:
        stand_in = types.ModuleType("nnsight")  # of its activation buffers, which no model uses
        stand_in.LanguageModel = object
        sys.modules["nnsight"] = stand_in
    return pytest.importorskip("dictionary_learning.dictionary")


@pytest.fixture(scope="module")
def circuit_tracer():
    return pytest.importorskip(
        "circuit_tracer.transcoder.single_layer_transcoder",
        reason="circuit-tracer is not installed: make bench-peers does it",
    )


def scramble(module: nn.Module) -> None:
    """Every parameter away from what it is at first; some scores below 0, some thresholds too."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            shape = parameter.shape
            parameter += 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64)


def assert_alike(ours: SparseAutoencoder, code: torch.Tensor, output: torch.Tensor) -> None:
    assert code.count_nonzero() > len(X)
    torch.testing.assert_close(ours.encode(X).to_dense(M), code.detach())
    torch.testing.assert_close(ours(X), output.detach())


LENS = [("StandardSAE", ReLUSAE), ("JumpReLUSAE", JumpReLUSAE), ("GatedSAE", GatedSAE)]
LENS += [("TopKSAE", TopKSAE), ("AbsTopKSAE", TopKSAE)]


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize(("name", "kind"), LENS)
def test_saelens(tmp_path: Path, sae_lens, name: str, kind: type, rescale: bool, centered: bool) -> None:
    options = {"k": K, "rescale_acts_by_decoder_norm": rescale} if "TopK" in name else {}
    config = getattr(sae_lens, f"{name}Config")(
        d_in=D, d_sae=M, dtype="float64", apply_b_dec_to_input=centered, **options
    )
    theirs = getattr(sae_lens, name)(config)
    scramble(theirs)
    theirs.save_model(tmp_path / "theirs")
    ours = formats.load(tmp_path / "theirs")
    assert type(ours) is kind
    code = theirs.encode(X)
    assert_alike(ours, code, theirs.decode(code))
    ours.save_pretrained(tmp_path / "ours", format="saelens")
    back = sae_lens.SAE.load_from_disk(str(tmp_path / "ours"), dtype="float64")
    assert type(back).__name__ == name
    torch.testing.assert_close(back.encode(X), code)
    torch.testing.assert_close(back(X), theirs(X))


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("name", ["BatchTopK", "MatryoshkaBatchTopK"])
def test_saelens_batches(tmp_path: Path, sae_lens, name: str, rescale: bool) -> None:
    """As it keeps them in training, and as they are published."""
    options = {"matryoshka_widths": [5, 20, M]} if name.startswith("M") else {}
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(
        d_in=D, d_sae=M, dtype="float64", k=K + 0.5, rescale_acts_by_decoder_norm=rescale, **options
    )
    theirs = getattr(sae_lens, f"{name}TrainingSAE")(config)
    scramble(theirs)
    theirs.topk_threshold.fill_(0.3)
    theirs.save_model(tmp_path / "training")
    ours, code = formats.load(tmp_path / "training"), theirs.encode(X)
    assert type(ours) is BatchTopKSAE
    assert ours.prefixes == tuple(options.get("matryoshka_widths", [M])[:-1])
    torch.testing.assert_close(ours.train().encode(X).code.to_dense(M), code.detach())
    theirs.save_inference_model(tmp_path / "published")
    published = sae_lens.SAE.load_from_disk(str(tmp_path / "published"))
    ours = formats.load(tmp_path / "published")
    assert type(ours) is JumpReLUSAE
    assert_alike(ours, published.encode(X), published(X))


@pytest.mark.parametrize("kind", [TopKSAE, BatchTopKSAE, JumpReLUSAE, GatedSAE, ReLUSAE])
def test_saelens_reads_what_was_trained_here(tmp_path: Path, sae_lens, kind: type) -> None:
    sae = scrambled(kind).eval()
    if kind is BatchTopKSAE:
        sae.threshold.fill_(0.5)
    sae.save_pretrained(tmp_path, format="saelens")
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path), dtype="float64")
    assert_alike(sae, theirs.encode(X), theirs(X))


@pytest.mark.parametrize("options", [{}, {"activation": "groupmax", "k": 8}, {"normalize_decoder": False}])
def test_sparsify(tmp_path: Path, sparsify, options: dict) -> None:
    config = sparsify.SparseCoderConfig(**{"num_latents": M, "k": K} | options)
    theirs = sparsify.SparseCoder(D, config, dtype=torch.float64)
    scramble(theirs)
    theirs.save_to_disk(tmp_path / "theirs")
    ours = formats.load(tmp_path / "theirs")
    found = theirs.encode(X)
    code = torch.zeros(len(X), M, dtype=X.dtype).scatter(1, found.top_indices, found.top_acts)
    output = theirs.decode(found.top_acts, found.top_indices)
    assert_alike(ours, code, output)
    ours.save_pretrained(tmp_path / "ours", format="sparsify")
    back = sparsify.SparseCoder.load_from_disk(tmp_path / "ours")
    assert back.cfg.to_dict() | {"expansion_factor": 0} == config.to_dict() | {"expansion_factor": 0}
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    again = back.encode(X)
    torch.testing.assert_close(back.decode(again.top_acts, again.top_indices), output)


def _dictionary(module: types.ModuleType, dict_class: str) -> nn.Module:
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    if dict_class == "MatryoshkaBatchTopKSAE":
        return matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(D, M, K, [5, 15, M - 20])
    if dict_class in ("AutoEncoderTopK", "BatchTopKSAE"):
        return getattr(top_k if dict_class == "AutoEncoderTopK" else batch_top_k, dict_class)(D, M, K)
    return getattr(module, dict_class)(D, M)


@pytest.mark.parametrize(
    "dict_class",
    [
        "AutoEncoderTopK",
        "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
        "JumpReluAutoEncoder",
        "GatedAutoEncoder",
        "AutoEncoder",
        "AutoEncoderNew",
    ],
)
def test_dictionary_learning(tmp_path: Path, dictionary_learning, dict_class: str) -> None:
    theirs = _dictionary(dictionary_learning, dict_class).double()
    scramble(theirs)
    if "TopK" in dict_class:
        theirs.threshold = torch.tensor(0.3)
    trainer = {"dict_class": dict_class, "activation_dim": D, "dict_size": M}
    trainer |= {"k": theirs.k.item()} if "TopK" in dict_class else {}
    torch.save({name: tensor.cpu() for name, tensor in theirs.state_dict().items()}, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    code = theirs.encode(X)
    assert_alike(formats.load(tmp_path), code, theirs.decode(code))


@pytest.mark.parametrize("function", ["relu", "jump"])
def test_circuit_tracer(tmp_path: Path, circuit_tracer, function: str) -> None:
    """A transcoder of one layer; it writes thresholds of whatever sign."""
    thresholds = torch.linspace(-0.5, 1.0, M, dtype=torch.float64)
    chosen = circuit_tracer.JumpReLU(thresholds, 0.1) if function == "jump" else torch.relu
    theirs = circuit_tracer.SingleLayerTranscoder(
        D, M, chosen, 3, device=torch.device("cpu"), dtype=torch.float64
    )
    scramble(theirs)
    theirs.to_safetensors(str(tmp_path / "layer_3.safetensors"))
    ours, code = formats.load(tmp_path), theirs.encode(X)
    assert type(ours) is (JumpReLUSAE if function == "jump" else ReLUSAE)
    assert_alike(ours, code, theirs.decode(code))


def test_circuit_tracer_cross_layer(tmp_path: Path, circuit_tracer) -> None:
    from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder

    theirs = CrossLayerTranscoder(2, M, D, lazy_decoder=False, device=torch.device("cpu"))
    theirs.to_safetensors(str(tmp_path))
    with pytest.raises(ValueError, match="must be a transcoder of one layer, got a cross-layer"):
        formats.load(tmp_path)
