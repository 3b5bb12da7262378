"""A report of a run: figures against fvu() and the codes, where its text is found, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsparse.collect.folder import Folder
from fastsparse.collect.texts import Document, windows
from fastsparse.nn import fvu
from fastsparse.report import Panel, ReportConfig, report
from fastsparse.train import TrainConfig, load_sae, train

D, WORDS = 8, ["because", "since", "due", "so", "as"]
SETTINGS = {"model": "tiny", "layer": [2], "module": [], "dtype": "float32"}
SMALL = {"num_latents": 16, "options": {"k": 1}, "steps": 2, "batch_size": 32, "device": "cpu"}


def words(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    ends = np.cumsum([len(word) + 1 for word in text.split()]) - 1
    starts = [0, *(ends[:-1] + 1).tolist()]
    return [WORDS.index(word) for word in text.split()], list(zip(starts, ends.tolist(), strict=True))


@pytest.fixture(scope="module")
def collection(tmp_path_factory) -> Path:
    """Two pieces of windows whose rows are their words' vectors, and a little noise."""
    folder = Folder(tmp_path_factory.mktemp("activations"), "float32")
    folder.say({"settings": SETTINGS, "from": {"model": "0", "texts": [["corpus.jsonl", 1]]}})
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    table = torch.randn(len(WORDS), D, generator=generator)
    texts = [Document(f"t{i}", " ".join(rng.choice(WORDS, 50))) for i in range(40)]
    cut = list(windows(texts, words, 25, held_out_every=8))
    for number, piece in enumerate((cut[:50], cut[50:])):
        rows = [table[window.ids] + 0.1 * torch.randn(25, D, generator=generator) for window in piece]
        folder.write(number, piece, rows)
    return folder.path


@pytest.fixture(scope="module")
def run(collection, tmp_path_factory) -> str:
    output = str(tmp_path_factory.mktemp("runs") / "first")
    train(
        TrainConfig(
            data=[str(collection)], output=output, num_latents=32, options={"k": 2}, steps=60,
            batch_size=100, lr=1e-2, device="cpu", block_tokens=25, buffer_tokens=500,
        )
    )  # fmt: skip
    return output


@pytest.fixture
def config(run, tmp_path) -> ReportConfig:
    return ReportConfig(run=run, output=str(tmp_path / "page.html"), device="cpu")


def test_figures_are_those_of_the_run(config, collection, run):
    seen = []
    panel = Panel("Mine", "<svg></svg>", "What I saw.")
    done = report(config, panels=lambda sae, rows: seen.append(rows) or [panel])
    result, sae, folder = done.result, load_sae(run), Folder(collection)
    counts = torch.zeros(32, dtype=torch.int64)
    for scores, held_out in ((result.training, False), (result.held_out, True)):
        rows = torch.cat([folder.rows(number, held_out=held_out) for number in range(2)])
        with torch.no_grad():
            code = sae.encode(rows)
            assert scores.fvu == pytest.approx(fvu(sae.decode(code), rows).item(), rel=1e-4)
        assert (scores.tokens, scores.l0) == (len(rows), (code.values > 0).sum().item() / len(rows))
        counts += torch.bincount(code.indices[code.values > 0], minlength=32)
    assert result.counts.tolist() == counts.tolist()
    assert result.held_out.tokens == 250
    assert len(seen[0]) == 2000
    page = done.path.read_text(encoding="utf-8")
    for text in ("What the latents of first stand for", "after layer 2", "corpus.jsonl", "Mine"):
        assert text in page
    assert f"report: {done.path.resolve()}" in done.summary()


def test_latents_are_shown_with_the_words_that_they_answer_to(config):
    """A word's latent fires on one word; on each of its examples that word is the peak."""
    shown = report(replace(config, features=3, title="A title")).result
    assert shown.title == "A title"
    assert len(shown.features) <= 3
    for feature in shown.features:
        for example in feature.examples:
            assert [text for text, _, top in example.pieces if top] == [example.word]
            assert example.topic.startswith("t")


def test_no_more_is_read_than_asked(config):
    few = report(replace(config, max_tokens=1)).result  # a piece is the least
    assert few.training.tokens + few.held_out.tokens == 50 * 25


@pytest.mark.parametrize("source", ["", "*.npy", "00000.npy"])
def test_the_text_is_found_by_what_the_run_was_trained_on(collection, tmp_path, source):
    data = [str(collection / source)]
    train(TrainConfig(data=data, output=str(tmp_path / "run"), **SMALL))
    done = report(ReportConfig(run=str(tmp_path / "run"), device="cpu"))
    assert done.path == tmp_path / "run" / "report.html"


@pytest.mark.parametrize(
    ("model", "options", "told"),
    [
        ("topk", {"k": 2, "prefixes": [4], "activation": "abs"}, "k = 2, activation = abs, prefixes = (4,)"),
        ("batchtopk", {"k": 1.5}, "batchtopk, M = 16, k = 1.5, Adam at"),
        ("jumprelu", {"threshold": 0.5}, "jumprelu, M = 16, threshold = 0.5, Adam at"),
        ("mp", {"k": 2, "nonnegative": False}, "k = 2, nonnegative = False"),
    ],
)
def test_every_kind_of_code_is_read(collection, tmp_path, model, options, told):
    """As it is: those that are ragged, and those with signs."""
    run = str(tmp_path / "run")
    settings = SMALL | {"model": model, "options": options}
    train(TrainConfig(data=[str(collection)], output=run, **settings))
    done, sae = report(ReportConfig(run=run, device="cpu")), load_sae(run)
    with torch.no_grad():
        code = sae.encode(torch.cat([Folder(collection).rows(i, held_out=True) for i in range(2)]))
    assert done.result.held_out.l0 == int((code.values != 0).sum()) / 250
    assert done.result.counts.sum() == pytest.approx(
        sum(part.l0 * part.tokens for part in (done.result.training, done.result.held_out))
    )
    assert told in done.path.read_text(encoding="utf-8")


def test_refusals(config, collection, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run: .*nothing: must be the folder of a training run"):
        report(replace(config, run=str(tmp_path / "nothing")))
    with pytest.raises(
        FileNotFoundError, match=r"must be a folder that `fastsparse collect` made, which holds"
    ):
        report(replace(config, data=str(tmp_path)))
    np.save(tmp_path / "a.npy", np.random.default_rng(0).standard_normal((200, D), dtype=np.float32))
    train(TrainConfig(data=[str(tmp_path / "a.npy")], output=str(tmp_path / "run"), **SMALL))
    with pytest.raises(FileNotFoundError, match=r"data: must be a folder .* the run was trained on .*a.npy"):
        report(replace(config, run=str(tmp_path / "run")))
    other = Folder(tmp_path, "float32")
    other.say({"settings": SETTINGS, "from": {"model": "0", "texts": []}})
    with pytest.raises(ValueError, match="must hold at least one piece, got none yet"):
        report(replace(config, data=str(tmp_path)))
    piece = Folder(collection).windows(0)[:2]
    other.write(0, piece, [torch.ones(25, D + 1)] * 2)
    with pytest.raises(ValueError, match=r"piece 0 must hold activations \(50, 8\) .*, got \(50, 9\)"):
        report(replace(config, data=str(tmp_path)))
    with pytest.raises(ValueError, match="features: must be at least 1, got 0"):
        replace(config, features=0)


def test_models_of_several_sources_are_refused(collection, tmp_path):
    folder, output = str(collection), str(tmp_path / "run")
    sizes = {"num_latents": 16, "options": {"k": 2}, "steps": 2, "batch_size": 100, "device": "cpu"}
    train(TrainConfig(data=[folder], targets=[folder], output=output, model="transcoder", **sizes))
    with pytest.raises(ValueError, match=r"^run: .* of one source, got a Transcoder"):
        report(ReportConfig(run=output, output=str(tmp_path / "page.html"), device="cpu"))
    assert not (tmp_path / "page.html").exists()
