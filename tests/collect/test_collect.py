"""Collecting from tiny models: whose rows these are, that kills leave no trace, and what is refused."""

import json
import multiprocessing
import os
import signal
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import CONTEXT, WORDS, D, save

from fastsparse.collect import CollectConfig
from fastsparse.collect.folder import Folder
from fastsparse.train.shards import Shards

transformers = pytest.importorskip("transformers")
from fastsparse.collect import collect  # noqa: E402 (needs the extra's packages)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> str:
    """40 documents of 20 to 98 words."""
    path = tmp_path_factory.mktemp("texts") / "corpus.jsonl"
    rng = np.random.default_rng(0)
    lines = [{"topic": f"t{i % 7}", "text": " ".join(rng.choice(WORDS, 20 + 2 * i))} for i in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def config(model: str, texts: str, tmp_path: Path) -> CollectConfig:
    return CollectConfig(
        model=model, texts=[texts], output=str(tmp_path / "here"), layer=[2], label="topic", context=CONTEXT,
        batch_size=4, held_out_every=5, shard_tokens=300, device="cpu",
    )  # fmt: skip


def contents(folder: str) -> dict[str, bytes]:
    """Every file but the lock."""
    paths = (path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@cache
def loaded(model: str) -> torch.nn.Module:
    return transformers.AutoModel.from_pretrained(model, local_files_only=True).eval()


def states(model: str, ids: list[int], layer: int) -> torch.Tensor:
    """What transformers says of one window: after so many layers, special tokens included."""
    with torch.no_grad():
        return loaded(model)(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_rows_are_the_models_and_belong_to_their_tokens(config, layer):
    done = collect(replace(config, layer=[layer]))
    folder = Folder(done.path)
    assert folder.pieces() > 3
    counted = {True: 0, False: 0}
    for number in range(folder.pieces()):
        windows = folder.windows(number)
        for held_out in (True, False):
            own = [window for window in windows if window.held_out is held_out]
            rows = folder.rows(number, held_out=held_out)
            expected = [states(config.model, [2, *window.ids, 3], layer)[1:-1] for window in own[:2]]
            assert len(rows) == sum(len(window.ids) for window in own)
            start = sum(map(len, expected))
            torch.testing.assert_close(rows[:start], torch.cat(expected or [rows[:0]]), rtol=1e-5, atol=1e-6)
            counted[held_out] += len(rows)
        assert sum(len(window.ids) for window in windows) >= 300 or number == folder.pieces() - 1
    words = [WORDS[i - 4] for i in windows[0].ids]
    assert [windows[0].text[start:end] for start, end in windows[0].spans] == words
    assert windows[0].label.startswith("t")
    assert (done.tokens, done.held_out, done.shape) == (counted[False], counted[True], (D,))
    assert sum(counted.values()) == sum(20 + 2 * i for i in range(40))
    assert abs(counted[True] / sum(counted.values()) - 1 / 5) < 0.05
    assert Shards([config.output]).rows == done.tokens  # what `fastsparse train` reads
    assert f"{done.tokens:,} tokens to train on" in done.summary()


def test_a_model_without_special_tokens_and_its_modules(config, tmp_path):
    gpt2 = save(tmp_path / "gpt2", "gpt2")
    made = {}
    places = {
        "layer": {"layer": [2]}, "block": {"module": ["h.1"]}, "mlp": {"module": ["h.1.mlp"]},
        "norm": {"module": ["h.1.ln_2"]}, "into mlp": {"module": ["h.1.mlp"], "side": "input"},
        "several": {"module": ["h.1.mlp", "h.1"]},
    }  # fmt: skip
    for name, place in places.items():
        output = str(tmp_path / name)
        collect(replace(config, **({"layer": [], "model": gpt2, "output": output} | place)))
        made[name] = Folder(Path(output)).rows(0)
    assert torch.equal(made["layer"], made["block"])
    assert not torch.allclose(made["layer"], made["mlp"])
    assert torch.equal(made["into mlp"], made["norm"])
    assert torch.equal(made["several"], torch.stack([made["mlp"], made["block"]], dim=1))
    (first, *_) = Folder(tmp_path / "layer").windows(0)
    torch.testing.assert_close(
        made["layer"][: len(first.ids)], states(gpt2, first.ids, 2), rtol=1e-5, atol=1e-6
    )


def test_several_layers(config, tmp_path):
    done = collect(replace(config, layer=[3, 1], output=str(tmp_path / "both")))
    assert done.shape == (2, D)
    assert f"of width 2 x {D}" in done.summary()
    for place, layer in enumerate([3, 1]):
        alone = collect(replace(config, layer=[layer], output=str(tmp_path / f"{layer}")))
        for number in range(Folder(done.path).pieces()):
            both = Folder(done.path).rows(number)
            torch.testing.assert_close(both[:, place], Folder(alone.path).rows(number), rtol=1e-5, atol=1e-6)
    wide = replace(config, layer=[], module=["encoder.layer.0", "encoder.layer.0.intermediate"])
    with pytest.raises(ValueError, match=r"intermediate: must be as wide as .*layer.0 \(D = 8\), got D = 12"):
        collect(replace(wide, output=str(tmp_path / "wide")))


@pytest.mark.parametrize(("dtype", "suffix"), [("float16", ".npy"), ("bfloat16", ".safetensors")])
def test_narrower_shards(config, tmp_path, dtype, suffix):
    collect(config)
    narrow = collect(replace(config, dtype=dtype, output=str(tmp_path / "narrow"), max_tokens=500))
    assert 500 - CONTEXT < narrow.tokens + narrow.held_out <= 500
    folder = Folder(narrow.path)
    assert Shards([str(narrow.path)]).dtype == getattr(torch, dtype)
    assert {path.suffix for path in (narrow.path / "held_out").iterdir()} == {suffix}
    assert torch.equal(folder.rows(0), Folder(Path(config.output)).rows(0).to(getattr(torch, dtype)))


def test_a_name_in_the_cache_needs_no_network(config, tmp_path, monkeypatch):
    """Nobody is asked, be the model there or not; an empty folder is no model."""
    cache, asked = tmp_path / "cache" / "models--me--tiny", []
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    save(cache / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache.parent))
    monkeypatch.setattr("socket.getaddrinfo", lambda *place, **_: asked.append(place))
    named = collect(replace(config, model="me/tiny"))
    assert named.tokens == collect(replace(config, output=str(tmp_path / "by folder"))).tokens
    for model in ("me/other", "no name/at/all", str(tmp_path)):
        with pytest.raises(OSError, match=f"model: {model}: must be the folder of a model, or its name"):
            collect(replace(config, model=model))
    assert asked == []


def test_nothing_is_done_twice_and_nothing_held_out_where_not_asked(config, monkeypatch):
    config = replace(config, held_out_every=0)
    first = collect(config)
    before = {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*.npy")}
    monkeypatch.setattr("fastsparse.collect.reader.Reader.read", None)
    assert collect(config) == first
    assert first.held_out == 0
    assert not (Path(config.output) / "held_out").exists()
    assert {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*.npy")} == before


PRELOADED = [
    "fastsparse.collect.run",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.tokenization_utils_tokenizers",
]


def killed(config: CollectConfig, rename: int) -> None:
    """Collect until this rename, then die by kill -9 with the file that it was for half written."""
    replace_file, renames = os.replace, count()

    def die(written, place):
        if next(renames) == rename:
            os.truncate(written, os.path.getsize(written) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        replace_file(written, place)

    os.replace = die
    collect(config)


def test_kills_leave_no_trace(config, tmp_path):
    """kill -9 all over a collection, files half written: at last there are the same bytes."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    whole = replace(config, output=str(tmp_path / "whole"))
    collect(whole)
    expected = contents(whole.output)
    for rename in (0, 1, 2, 4):
        process = processes.Process(target=killed, args=(config, rename))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        found = contents(config.output)
        assert sum(name.endswith(".partial") for name in found) == 1
        written = [name for name in found if not name.endswith(".partial") and name != "collection.json"]
        assert all(found[name] == expected[name] for name in written)
    collect(config)
    assert contents(config.output) == expected


def test_a_full_disk_leaves_whole_files(config, monkeypatch):
    whole = replace(config, output=config.output + "-whole")
    collect(whole)
    save_array, saved = np.save, []

    def full(file, array):
        if len(saved) == 4:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        saved.append(save_array(file, array))

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(OSError, match="No space left"):
            collect(config)
    assert not [name for name in contents(config.output) if "partial" in name]
    collect(config)
    assert contents(config.output) == contents(whole.output)


def test_what_was_begun_otherwise_is_not_gone_on_with(config, texts, tmp_path):
    collect(config)
    before = contents(config.output)
    other = tmp_path / "other.jsonl"
    other.write_text(Path(texts).read_text() + "\n".join(['{"topic": "x", "text": "so on"}'] * 3))
    for change, message in (
        ({"layer": [1]}, r"layer: must be \[2\] to resume from .*, got \[1\]"),
        ({"batch_size": 8}, "batch_size: must be 4 .*, got 8"),
        ({"model": save(tmp_path / "bert")}, "model: must be '.*bert.*'"),
        ({"texts": [str(other)]}, r"texts: must be \[\['corpus.jsonl', \d+\]\] .*, got \[\['other.jsonl'"),
    ):
        with pytest.raises(ValueError, match=message):
            collect(replace(config, **change))
    save(Path(config.model), seed=1)  # under the same name
    with pytest.raises(ValueError, match=r"model: must be '[0-9a-f]{8}' to resume"):
        collect(config)
    save(Path(config.model))
    assert contents(config.output) == before


CONTEXTS = "context: must be between 3 and the 32 tokens that the model reads"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layer": [4]}, ValueError, "layer: must be between 0 and the model's 3, got 4"),
        ({"layer": []}, ValueError, r"layer, module: one .* must be given, got layer=\(\), module=\(\)"),
        ({"module": ["h"]}, ValueError, r"layer, module: one of .* given, got layer=\(2,\), module=\('h',\)"),
        (
            {"side": "input"},
            ValueError,
            "side: must be 'output' with layer, got 'input': name modules instead",
        ),
        ({"side": "both"}, ValueError, "side: must be one of output, input"),
        ({"layer": [], "module": ["layer.9"]}, ValueError, "such as encoder.layer.*, got 'layer.9'"),
        ({"layer": [], "module": ["pooler"]}, ValueError, r"module pooler: must give shape \(4, \d+\) \+"),
        ({"context": 33}, ValueError, f"{CONTEXTS}, got 33"),
        ({"context": 2}, ValueError, f"{CONTEXTS}, got 2"),
        ({"dtype": "int8"}, ValueError, "dtype: must be one of float32, float16, bfloat16, got 'int8'"),
        ({"held_out_every": -1}, ValueError, "held_out_every: must be at least 0, got -1"),
        ({"device": "tpu"}, ValueError, "device: must be auto, cpu, cuda or cuda:<number>, got 'tpu'"),
        ({"field": "body"}, ValueError, "corpus.jsonl:1 must hold text in 'body', got None"),
        ({"max_tokens": 5}, ValueError, "texts: must hold at least one window of tokens, got none"),
    ],
)
def test_refusals(config, change, error, message):
    with pytest.raises(error, match=message):
        collect(replace(config, **change))


def test_what_is_not_finite_is_not_kept(config, tmp_path):
    folder = save(tmp_path / "wild", "gpt2", seed=2)
    wild = transformers.AutoModel.from_pretrained(folder)
    wild.wte.weight.data *= 1e8
    wild.save_pretrained(folder)
    wild = replace(config, model=folder, dtype="float16", layer=[0])
    with pytest.raises(
        FloatingPointError, match="piece 0: the activations hold NaN or infinities in float16"
    ):
        collect(wild)
    assert list(contents(config.output)) == ["collection.json"]
    collect(config)  # nothing came of it: the folder is free


def test_one_process_a_folder(config, monkeypatch):
    monkeypatch.setattr("fastsparse.collect.run._collect", lambda *_: collect(config))
    with pytest.raises(BlockingIOError, match="another run is using this output folder"):
        collect(config)
