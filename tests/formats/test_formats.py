"""Which format a place holds, what a message says of it, and what every format refuses."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from autoencoders import make
from layouts import EXAMPLES, Published
from torch import nn

from fastsparse import formats
from fastsparse.formats import FORMATS
from fastsparse.nn import SparseAutoencoder, TopKSAE

HERE = Path(__file__).parent
EACH = pytest.mark.parametrize("name", FORMATS)
CONFIGURED = [name for name, example in EXAMPLES.items() if example().config and name != "gemma_scope_2"]


def written(name: str, folder: Path) -> Path:
    """The file of weights."""
    published = EXAMPLES[name]()
    return published.write(folder) / published.weights


def test_every_format_has_its_example_its_tests_and_its_row() -> None:
    page = (HERE.parents[1] / "docs" / "formats.md").read_text()
    assert sorted(EXAMPLES) == sorted(FORMATS)
    for name in FORMATS:
        assert (HERE / f"test_{name}.py").is_file()
        assert f"| `{name}` |" in page


@EACH
def test_is_recognised(tmp_path: Path, name: str) -> None:
    path = written(name, tmp_path)
    for place in (path, path.parent):
        found = formats.load(place)
        assert isinstance(found, SparseAutoencoder)
        assert not found.training
        assert torch.equal(formats.load(place, format=name).W_enc, found.W_enc)


@EACH
def test_dtype_and_no_global_state(tmp_path: Path, name: str) -> None:
    path = written(name, tmp_path)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    sae = formats.load(path, dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), state)
    assert {parameter.dtype for parameter in sae.parameters()} == {torch.float64}
    assert formats.load(path).W_enc.dtype == torch.float32


def test_unknown_places_are_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: there is no such file or folder; nothing is down"):
        formats.load(tmp_path / "nowhere")
    (tmp_path / "layers.5").mkdir()
    (tmp_path / "README.md").write_text("")
    with pytest.raises(
        ValueError, match=r"known format, its folder holds README.md, layers.5/; known"
    ) as error:
        formats.load(tmp_path)
    assert all(f"{name} (" in str(error.value) for name in FORMATS)
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_text("")
    with pytest.raises(ValueError, match=r"00.txt, .*, 11.txt and 10 more; known are"):
        formats.load(tmp_path)


def test_a_transformer_is_no_autoencoder(tmp_path: Path) -> None:
    published = EXAMPLES["fastsparse"]()
    with pytest.raises(
        ValueError, match=r"must be of a known format, its folder holds config.json, model.safe"
    ):
        formats.load(published._replace(options={"model_type": "bert"}).write(tmp_path))


def test_ambiguous_places_are_explained(tmp_path: Path) -> None:
    written("saelens", tmp_path)
    written("sparsify", tmp_path)
    with pytest.raises(
        ValueError, match=r"must be of one format, it is of saelens \(.*\), sparsify \(.*: say which"
    ):
        formats.load(tmp_path)
    assert type(formats.load(tmp_path / "sae.safetensors")) is TopKSAE
    assert type(formats.load(tmp_path, format="sparsify")) is TopKSAE


def test_arguments(tmp_path: Path) -> None:
    path = written("saelens", tmp_path)
    with pytest.raises(ValueError, match=r"^format must be one of circuit_tracer, .*, got 'other'"):
        formats.load(path, format="other")
    with pytest.raises(TypeError, match=r"^load: dtype must be float32, .* or None, got torch.int8"):
        formats.load(path, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"^load: k must be left out or 5 of .*, got 7"):
        formats.load(path, k=7)
    with pytest.raises(ValueError, match=r"^load: k must be left out of .*, got 7"):
        formats.load(written("gemma_scope", tmp_path / "b"), k=7)
    with pytest.raises(
        ValueError, match=r"^format must be one of fastsparse, saelens, sparsify, got 'openai'"
    ):
        formats.save(make(TopKSAE), tmp_path, format="openai")
    with pytest.raises(TypeError, match=r"^save: model must be a fastsparse.nn.Model, got Linear"):
        formats.save(nn.Linear(2, 2), tmp_path)


@pytest.mark.parametrize("saved", ["fastsparse", "saelens", "sparsify"])
def test_no_file_of_another_format_is_written_beside(tmp_path: Path, saved: str) -> None:
    for name in sorted(FORMATS.keys() - {saved}):
        folder = written(name, tmp_path / name).parent
        before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        with pytest.raises(ValueError, match=rf"must hold no files of another format, it holds .*{name} \("):
            formats.save(make(TopKSAE), folder, format=saved)
        assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_what_is_missing_is_explained(tmp_path: Path, monkeypatch) -> None:
    sparse, npz = written("sparsify", tmp_path / "a"), written("gemma_scope", tmp_path / "b")
    for package in ("numpy", "safetensors"):
        monkeypatch.setitem(sys.modules, package, None)
    said = r"^fastsparse.formats needs {}, which is not installed: pip install 'fastsparse-torch\[train\]'"
    with pytest.raises(ModuleNotFoundError, match=said.format("safetensors")):
        formats.save(make(TopKSAE), tmp_path / "c")
    with pytest.raises(ModuleNotFoundError, match=said.format("numpy")):
        formats.load(npz)
    assert type(formats.load(sparse)) is TopKSAE  # needs neither


# ---- what every format refuses ----


@EACH
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_files_that_are_cut(tmp_path: Path, name: str, kept: float) -> None:
    path = written(name, tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*(not a whole|damaged or cut)"):
        formats.load(path)


@EACH
def test_files_of_other_bytes(tmp_path: Path, name: str) -> None:
    path = written(name, tmp_path)
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*(not a whole|damaged or cut)"):
        formats.load(path)


def changed(name: str, folder: Path, change: dict) -> Path:
    published: Published = EXAMPLES[name]()
    published = published._replace(tensors=published.tensors | change)
    return published.write(folder) / published.weights


@EACH
def test_tensors_of_another_shape(tmp_path: Path, name: str) -> None:
    wrong = {
        tensor: value[..., :-1]
        for tensor, value in EXAMPLES[name]().tensors.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 0
    }
    assert len(wrong) >= 4
    for number, (tensor, value) in enumerate(wrong.items()):
        path = changed(name, tmp_path / str(number), {tensor: value.contiguous()})
        said = r"\S+ must have shape \([MD0-9, ]+\)( = \([MD0-9, ]+\))?, got \([0-9, ]+\)"
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: {said}"):
            formats.load(path)


@EACH
def test_tensors_of_another_dtype(tmp_path: Path, name: str) -> None:
    for number, (tensor, value) in enumerate(EXAMPLES[name]().tensors.items()):
        if not (isinstance(value, torch.Tensor) and value.dim() == 2):
            continue
        path = changed(name, tmp_path / str(number), {tensor: torch.zeros_like(value, dtype=torch.int64)})
        with pytest.raises(
            ValueError, match=rf"^{re.escape(str(path))}: {tensor} must be float32.*, got int64"
        ):
            formats.load(path)


@EACH
def test_tensors_that_are_missing_or_unknown(tmp_path: Path, name: str) -> None:
    published = EXAMPLES[name]()
    first = next(tensor for tensor in published.tensors if re.match("W_enc|w_enc|encoder.weight", tensor))
    left = {tensor: value for tensor, value in published.tensors.items() if tensor != first}
    path = published._replace(tensors=left).write(tmp_path / "a") / published.weights
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: must hold a tensor {first}, it holds "):
        formats.load(path)
    path = changed(name, tmp_path / "b", {"other": torch.zeros(3)})
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(path))}: must hold .* and no more, it holds other too"
    ):
        formats.load(path)


@pytest.mark.parametrize("name", CONFIGURED)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", r"must be JSON, got b'{'"),
        (b"\xff\xfe", r"must be JSON, got b'\\xff\\xfe'"),
        (b"[" * 10**5, r"must be JSON, got b'\[\[\["),
        (b"[1]", r"must be a JSON object, got \[1\]"),
        (None, "must be there beside the weights, there is no such file"),
    ],
)
def test_configurations_that_are_none(tmp_path: Path, name: str, text: bytes | None, said: str) -> None:
    published = EXAMPLES[name]()
    path = published.write(tmp_path) / published.config
    path.unlink() if text is None else path.write_bytes(text)
    with pytest.raises(
        FileNotFoundError if text is None else ValueError, match=f"{published.config}: {said}"
    ):
        formats.load(tmp_path, format=name)


class Evil:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", ["dictionary_learning", "qwen_scope", "openai"])
def test_pickles_are_not_run(tmp_path: Path, name: str) -> None:
    trace = tmp_path / "trace"
    path = changed(name, tmp_path / "a", {"other": Evil(trace)})
    with pytest.raises(
        ValueError, match=r"must be a dictionary of tensors that torch.load\(weights_only=True\)"
    ):
        formats.load(path)
    assert not trace.exists()
    torch.save([torch.zeros(3)], path)
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(path))}: must be a dictionary of tensors, got list"
    ):
        formats.load(path)
    path = changed(name, tmp_path / "b", {"b_enc": 3, "encoder.bias": 3, "latent_bias": 3})
    with pytest.raises(ValueError, match=r"(b_enc|encoder.bias|latent_bias) must be a dense tensor, got int"):
        formats.load(path)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "params.npz")
    with pytest.raises(OSError, match=r"params.npz: must be a file, got a pipe or a device"):
        formats.load(tmp_path / "params.npz")
