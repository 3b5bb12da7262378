"""`fastsparse evaluate`: the figures of a run on shards, printed and written."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastsparse.__main__ import main
from fastsparse.evaluate import EvaluateConfig, evaluate
from fastsparse.metrics import evaluate as measured
from fastsparse.train import TrainConfig, load_sae, train


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A short run on two shards, which stand beside it."""
    generator = torch.Generator().manual_seed(0)
    for name, rows in (("a", 150), ("b", 70)):
        np.save(tmp_path / f"{name}.npy", torch.randn(rows, 8, generator=generator).numpy())
    sizes = ["--num-latents", "32", "--k", "3", "--batch-size", "32", "--device", "cpu", "--steps", "5"]
    assert main(["train", str(tmp_path), "--output", str(tmp_path / "run"), *sizes]) == 0
    return tmp_path / "run"


def tokens(run: Path) -> torch.Tensor:
    return torch.cat([torch.from_numpy(np.load(run.parent / f"{name}.npy")) for name in "ab"])


def test_from_the_command_line(run, capsys):
    capsys.readouterr()
    options = ["--data", str(run.parent), "--batch-size", "64", "--device", "cpu"]
    assert main(["evaluate", str(run), *options]) == 0
    out = capsys.readouterr().out
    expected = measured(load_sae(run), [tokens(run)])
    assert f"tokens              220\nL0                  {expected.l0:.2f} of 32 latents\n" in out
    assert f"FVU                 {expected.fvu:.4f}\n" in out
    record = json.loads((run / "evaluation.json").read_text())
    assert record["num_tokens"] == 220
    assert record["fvu"] == pytest.approx(expected.fvu)
    assert record["effective_features"] == pytest.approx(expected.effective_features)
    assert sum(record["density_histogram"]["counts"]) + record["num_dead"] == 32
    assert (record["d_model"], record["num_latents"]) == (8, 32)


@pytest.mark.parametrize("most", [1, 64, 150, 151, 219, 500])
def test_so_many_tokens_and_no_more(run, most, tmp_path):
    output = str(tmp_path / "figures.json")
    data = [str(run.parent / "a.npy"), str(run.parent / "b.npy")]
    config = EvaluateConfig(
        run=str(run), data=data, output=output, batch_size=64, max_tokens=most, device="cpu"
    )
    found = evaluate(config)
    expected = measured(load_sae(run), [tokens(run)[:most]])
    assert found.measures.num_tokens == expected.num_tokens == min(most, 220)
    assert found.measures.fvu == pytest.approx(expected.fvu)
    assert not (run / "evaluation.json").exists()
    assert json.loads(Path(output).read_text())["l0"] == pytest.approx(expected.l0)


def test_one_checkpoint(run):
    checkpoint = next(iter(run.glob("checkpoint-*.safetensors")))
    found = evaluate(EvaluateConfig(run=str(checkpoint), data=[str(run.parent / "a.npy")], device="cpu"))
    assert found.path == run / "evaluation.json"
    assert found.measures.num_tokens == 150


def test_another_width_is_refused(run):
    np.save(run.parent / "wide.npy", np.zeros((3, 9), dtype=np.float32))
    config = EvaluateConfig(run=str(run), data=[str(run.parent / "wide.npy")], device="cpu")
    with pytest.raises(ValueError, match=r"must hold rows of the run's shape, \(8,\), got \(9,\)"):
        evaluate(config)
    assert not (run / "evaluation.json").exists()


def test_models_of_several_sources_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(64, 2, 8)).astype(np.float32))
    data = [str(tmp_path / "x.npy")]
    sizes = {"num_latents": 16, "options": {"k": 3}, "steps": 2, "batch_size": 32, "device": "cpu"}
    train(TrainConfig(data=data, output=str(tmp_path / "run"), model="crosscoder", **sizes))
    with pytest.raises(ValueError, match=r"^run: .* of one source, got a Crosscoder"):
        evaluate(EvaluateConfig(run=str(tmp_path / "run"), data=data, device="cpu"))
