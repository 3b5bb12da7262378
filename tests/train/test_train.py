"""Training from stored activations: that it learns, what it leaves behind, and what it refuses."""

import errno
import gc
import json
import os
import random
import re
import resource
import shutil
import signal
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from train.runs import assert_same_run, records

from fastsparse._settings import resolved_device
from fastsparse.nn import (
    BatchTopKSAE,
    Crosscoder,
    CrossLayerTranscoder,
    GatedSAE,
    GroupSparseSAE,
    JumpReLUSAE,
    MatchingPursuitSAE,
    Model,
    ReLUSAE,
    TopKSAE,
    Transcoder,
)
from fastsparse.train import Metrics, TrainConfig, TrainingInterrupted, load_sae, train
from fastsparse.train import checkpoint as checkpoint_module
from fastsparse.train.models import MODELS, options_of

D, M, K = 16, 48, 3


class Case(NamedTuple):
    """A model: its options, what its FVU falls below of what it began with, other options that it takes.

    And in which folders its data are.
    """

    kind: type[Model]
    options: dict
    left: float
    others: dict
    inputs: str = ""
    targets: str | None = None


CASES = {
    "topk": Case(TopKSAE, {"k": K}, 0.5, {"k": 2, "budgets": [2, 8], "activation": "abs"}),
    "batchtopk": Case(BatchTopKSAE, {"k": K}, 0.5, {"k": 2.29, "prefixes": [8, 24], "unit_norm": False}),
    "jumprelu": Case(
        JumpReLUSAE,
        {"threshold": 0.1, "bandwidth": 0.2},
        0.5,
        {"penalty": "tanh", "threshold_form": "linear", "dense": "stripes", "prefixes": [8, 24]},
    ),
    "gated": Case(GatedSAE, {"l1": 0.01}, 0.5, {"l1": 0.02, "dense": "sparse", "prefixes": [8]}),
    "relu": Case(
        ReLUSAE, {"l1": 0.01}, 0.5, {"l1": 0.02, "p": 0.9, "decoder": "polynomial", "ranks": [8, 4, 2]}
    ),
    # Pursuit may take more steps than there are atoms.
    "mp": Case(MatchingPursuitSAE, {"k": K}, 0.7, {"k": 3 * M + 1, "nonnegative": False}),
    "transcoder": Case(
        Transcoder, {"k": K}, 0.6, {"encoder": "jumprelu", "penalty": "tanh", "skip": True}, "", "outputs"
    ),
    "crosscoder": Case(
        Crosscoder, {"k": K}, 0.6, {"encoder": "batchtopk", "k": 2.29, "prefixes": [8, 24]}, "stacked"
    ),
    "clt": Case(
        CrossLayerTranscoder,
        {"k": K},
        0.6,
        {"encoder": "batchtopk", "k": 2.5, "decoder": "polynomial", "ranks": [8, 4, 2]},
        "stacked",
        "stacked outputs",
    ),
    "groupsparse": Case(
        GroupSparseSAE, {"k": K}, 0.7, {"k": 2, "shared_support": True, "mask_seed": 3}, "stacked"
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """2000 sparse combinations of 48 atoms, off centre, in two shards of different formats and dtypes."""
    folder = tmp_path_factory.mktemp("activations")
    generator = torch.Generator().manual_seed(0)
    atoms = F.normalize(torch.randn(M, D, generator=generator), dim=1)
    chosen = torch.rand(2000, M, generator=generator).topk(K, dim=1).indices
    x = (atoms[chosen] * (1 + torch.rand(2000, K, 1, generator=generator))).sum(dim=1) + 2
    outputs = x.relu() @ torch.randn(D, D + 3, generator=generator)
    shards(folder, x)
    shards(folder / "outputs", outputs)
    shards(folder / "stacked", torch.stack([x, x.flip(1)], dim=1))
    shards(folder / "stacked outputs", torch.stack([outputs[:, :D], outputs[:, 3:]], dim=1))
    return str(folder)


def shards(folder: Path, rows: torch.Tensor) -> None:
    folder.mkdir(exist_ok=True)
    np.save(folder / "a.npy", rows[:900].numpy())
    save_file({"x": rows[900:].bfloat16()}, folder / "b.safetensors")


def of(config: TrainConfig, model: str) -> TrainConfig:
    """The run with another model, whose data it has."""
    (folder,), case = config.data, CASES[model]
    targets = [] if case.targets is None else [f"{folder}/{case.targets}"]
    return replace(
        config, model=model, data=[f"{folder}/{case.inputs}"], targets=targets, options=case.options
    )


def configured(data: str, output: Path) -> TrainConfig:
    return TrainConfig(
        data=[data], output=str(output), num_latents=M, options={"k": K, "dead_after": 1000}, steps=40,
        batch_size=128, lr=5e-3, block_tokens=16, buffer_tokens=256, log_every=5, checkpoint_every=15,
        device="cpu",
    )  # fmt: skip


@pytest.fixture
def config(data: str, tmp_path: Path) -> TrainConfig:
    return configured(data, tmp_path / "run")


@pytest.fixture(scope="module")
def finished(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 40 steps that nothing interrupted."""
    return train(configured(data, tmp_path_factory.mktemp("finished") / "run")).log.parent


def names(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir() if path.name != ".lock")


def interrupt_at(step: int, number: int = signal.SIGINT) -> Callable[[Metrics], None]:
    def hook(metrics: Metrics) -> None:
        if metrics.step == step:
            os.kill(os.getpid(), number)

    return hook


def test_every_model_is_trained_here() -> None:
    assert {model: case.kind for model, case in CASES.items()} == MODELS


@pytest.mark.parametrize("model", CASES)
def test_it_learns_and_leaves_a_log_and_checkpoints(config: TrainConfig, model: str) -> None:
    seen: list[Metrics] = []
    case = CASES[model]
    settings = replace(of(config, model), steps=200)
    result = train(settings, on_metrics=seen.append)
    assert type(result.sae) is case.kind
    assert result.metrics.loss < case.left * seen[0].loss
    assert result.metrics.fvu < case.left * seen[0].fvu
    assert [metrics.step for metrics in seen] == list(range(5, 201, 5))
    assert result.metrics.tokens == 200 * 128
    assert 0 < result.metrics.l0 <= case.options.get("k", M)
    assert 0 < result.metrics.density <= 1
    assert result.metrics.tokens_per_second > 0
    log = records(result.log)
    assert [line["step"] for line in log] == [metrics.step for metrics in seen]
    assert log[-1]["loss"] == seen[-1].loss
    expected = ["checkpoint-000000195.safetensors", "checkpoint-000000200.safetensors", "log.jsonl"]
    assert names(config.output) == expected
    assert not result.sae.training
    for coder in getattr(result.sae, "coders", [result.sae]):
        if coder.unit_norm:
            torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(M))


def test_the_same_seed_gives_the_same_bits(config: TrainConfig, finished: Path) -> None:
    torch.manual_seed(2)  # the global generator has no part in it
    state = torch.get_rng_state()
    again = train(config)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_run(again.log.parent, finished)
    other = train(replace(config, output=config.output + "-other", seed=1))
    with pytest.raises(AssertionError):  # which the comparison can see
        assert_same_run(other.log.parent, finished)


@pytest.mark.parametrize("model", CASES)
@pytest.mark.parametrize("which", ["options", "others"])
def test_load_sae(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, model: str, which: str) -> None:
    monkeypatch.setattr(checkpoint_module, "_PIECE", 1000)  # tensors are read in several
    options = {**getattr(CASES[model], which), "dead_after": 1000}
    result = train(replace(of(config, model), options=options, steps=1))
    copy = shutil.copy(result.checkpoint, result.checkpoint.with_name("best.safetensors"))
    for path in (config.output, result.checkpoint, copy):
        sae = load_sae(path)
        assert str(sae) == str(result.sae)  # sizes and options
        assert (type(sae), sae.options()["dead_after"], sae.training) == (CASES[model].kind, 1000, False)
        for name, tensor in result.sae.state_dict().items():
            assert torch.equal(sae.state_dict()[name], tensor)
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint"):
        load_sae(Path(config.output).parent)


def test_checkpoints_hold_tensors_and_json_only(finished: Path, data: str) -> None:
    with safe_open(finished / "checkpoint-000000040.safetensors", framework="pt") as file:
        metadata, stored = json.loads(file.metadata()["fastsparse"]), set(file.keys())
    assert (metadata["step"], metadata["config"]["lr"], metadata["data"]) == (40, 5e-3, [data])
    parameters, buffers = {"W_enc", "b_enc", "W_dec", "b_dec"}, {"tokens_since_fired", "threshold"}
    assert stored == {f"sae.{name}" for name in parameters | buffers} | {
        f"adam.{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in parameters
    }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_goes_on_to_the_same_end(config: TrainConfig, finished: Path, number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(
        TrainingInterrupted, match=r"interrupted after step 2[01]; .*checkpoint-00000002"
    ) as caught:
        train(config, on_metrics=interrupt_at(20, number))
    assert caught.value.signal_number == number
    assert signal.getsignal(number) == before
    assert_same_run(train(config).log.parent, finished)


@pytest.mark.parametrize("model", CASES)
@pytest.mark.parametrize("which", ["options", "others"])
def test_every_model_goes_on_to_the_same_end(
    config: TrainConfig, tmp_path: Path, model: str, which: str
) -> None:
    """With atoms that die and are revived."""
    options = {**getattr(CASES[model], which), "dead_after": 300}
    if revived := "aux_k" in {about.name for about in fields(options_of(model))}:
        options["aux_k"] = 2
    begun = replace(of(config, model), options=options, num_latents=3 * M, steps=30, checkpoint_every=10)
    whole = train(begun)
    if revived and options.get("k", M) < M:  # where as many may be active as there are, none need be dead
        assert any(record["aux"] > 0 for record in records(whole.log))
    stopped = replace(begun, output=str(tmp_path / "stopped"))
    with pytest.raises(TrainingInterrupted):
        train(stopped, on_metrics=interrupt_at(15))
    assert_same_run(train(stopped).log.parent, whole.log.parent)


def test_what_has_no_gradient_has_no_moments(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    class Frozen(TopKSAE):
        def reset_parameters(self, generator: torch.Generator | None = None) -> None:
            super().reset_parameters(generator)
            self.b_enc.requires_grad_(False)

    monkeypatch.setitem(MODELS, "topk", Frozen)
    whole = train(config)
    with safe_open(whole.checkpoint, framework="pt") as file:
        assert "adam.step.W_enc" in file.keys()  # noqa: SIM118
        assert "adam.step.b_enc" not in file.keys()  # noqa: SIM118
    stopped = replace(config, output=config.output + "-stopped")
    train(replace(stopped, steps=20))
    assert_same_run(train(stopped).log.parent, whole.log.parent)


def test_checkpoints_of_unknown_models_are_refused(config: TrainConfig) -> None:
    path = train(replace(config, steps=5)).checkpoint
    tensors, metadata = load_file(path), metadata_of(path)
    for model in ("omp", None, ["topk"]):
        checkpoint_module.write(path, tensors, metadata | {"config": {"model": model}})
        message = f"model must be one of {', '.join(MODELS)}, got {model!r}"
        with pytest.raises(ValueError, match=re.escape(message)):
            load_sae(path)
    checkpoint_module.write(path, tensors, metadata | {"sae": {"d_model": "wide"}})
    with pytest.raises(ValueError, match=f"{path.name}: sae must hold the sizes and options of a topk"):
        load_sae(path)


def test_damage_of_any_kind_is_seen(config: TrainConfig) -> None:
    """Flipped bits, zeroed blocks and swapped ones, in header, metadata and tensors."""
    path = train(replace(config, steps=5)).checkpoint
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    places = [*range(24), *rng.sample(range(header), 80), *rng.sample(range(header, len(whole)), 80)]

    def assert_refused(content: bytes) -> None:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path.name}: "):
            load_sae(path)

    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.randrange(8)
        assert_refused(flipped)
    for size in (4, 512, 4096):
        for begin in range(0, len(whole), max(size, len(whole) // 20)):
            zeroed = whole[:begin] + bytes(len(whole[begin : begin + size])) + whole[begin + size :]
            if zeroed != whole:
                assert_refused(zeroed)
    assert_refused(whole[:-1024] + whole[-512:] + whole[-1024:-512])
    path.write_bytes(whole)
    load_sae(path)


def test_what_was_just_written_is_kept(config: TrainConfig) -> None:
    """Whatever else appears in the folder meanwhile."""
    folder = Path(config.output)

    def strew(metrics: Metrics) -> None:
        if metrics.step == 20:
            (folder / "checkpoint-000000003.safetensors").mkdir()
            (folder / "checkpoint-000000900.safetensors").write_bytes(b"")

    result = train(replace(config, keep_checkpoints=1), on_metrics=strew)
    assert load_sae(result.checkpoint).k == K
    kept = [f"checkpoint-{step:09d}.safetensors" for step in (3, 40, 900)]
    assert names(config.output) == [*kept, "log.jsonl"]


def test_a_run_can_be_made_longer_where_the_schedule_allows(config: TrainConfig, finished: Path) -> None:
    train(replace(config, steps=23))
    assert_same_run(train(config).log.parent, finished)
    with pytest.raises(ValueError, match=r"steps: must be at least the 40 that .* has done, got 39"):
        train(replace(config, steps=39))
    decaying = replace(config, output=config.output + "-decaying", decay_steps=5)
    train(replace(decaying, steps=20))
    with pytest.raises(ValueError, match=r"steps: must be 20 to resume from .*, got 21"):
        train(replace(decaying, steps=21))


def test_a_finished_run_is_only_loaded(config: TrainConfig) -> None:
    result = train(config)
    before = result.checkpoint.stat().st_mtime_ns
    again = train(config)
    assert again.metrics is None
    assert again.checkpoint == result.checkpoint
    assert result.checkpoint.stat().st_mtime_ns == before
    assert torch.equal(again.sae.W_enc, result.sae.W_enc)
    assert len(records(again.log)) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"k": 4, "dead_after": 1000}}, "k: must be 3 to resume from .*, got 4"),
        (
            {"options": {"k": K, "dead_after": 1000, "prefixes": [8]}},
            r"prefixes: must be \[\] to resume from .*, got \[8\]",
        ),
        ({"lr": None}, "lr: must be 0.005 to resume from"),
        ({"seed": 1}, "seed: must be 0 to resume"),
        ({"bf16": True}, "bf16: must be False to resume"),
        ({"model": "mp"}, "model: must be 'topk' to resume from .*, got 'mp'"),
    ],
)
def test_changed_configurations_are_refused(config: TrainConfig, change: dict, message: str) -> None:
    train(replace(config, steps=5))
    with pytest.raises(ValueError, match=message):
        train(replace(config, **change))
    train(replace(config, steps=6, log_every=1, checkpoint_every=1, keep_checkpoints=1))


def test_changed_data_are_refused_and_moved_data_are_not(
    config: TrainConfig, data: str, tmp_path: Path
) -> None:
    train(replace(config, steps=5))
    with pytest.raises(ValueError, match=r"data: must be the 2 shards that .* was trained on"):
        train(replace(config, data=[f"{data}/a.npy"]))
    with pytest.raises(ValueError, match=r"data: must be the 2 shards"):
        train(replace(config, data=[f"{data}/b.safetensors", f"{data}/a.npy"]))
    moved = tmp_path / "moved"
    moved.symlink_to(data)
    train(replace(config, steps=6, data=[str(moved)]))


def metadata_of(path: Path) -> dict:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["fastsparse"])


def broken_checkpoints() -> dict[str, tuple[Callable[[Path], None], str]]:
    def holding(change: Callable[[dict], object]) -> Callable[[Path], None]:
        """Other tensors with the right checksums."""

        def rewrite(path: Path) -> None:
            tensors = load_file(path)
            change(tensors)
            checkpoint_module.write(path, tensors, metadata_of(path))

        return rewrite

    def say(text: str) -> Callable[[Path], None]:
        crc32 = str(zlib.crc32(text.encode()))
        return lambda p: save_file(load_file(p), p, {"fastsparse": text, "crc32": crc32})

    def told(**change: object) -> Callable[[Path], None]:
        return lambda p: checkpoint_module.write(p, load_file(p), metadata_of(p) | change)

    return {
        "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "not a whole .safetensors file"),
        "a bit": (
            lambda p: p.write_bytes(p.read_bytes()[:-1] + bytes([p.read_bytes()[-1] ^ 1])),
            r"not a whole checkpoint: \S+ is not what was written",
        ),
        "foreign": (lambda p: save_file(load_file(p), p), "not a whole checkpoint of format 3"),
        "no checksum": (
            lambda p: save_file(load_file(p), p, {"fastsparse": json.dumps(metadata_of(p))}),
            "not a whole checkpoint of format 3: its metadata fail their checksum",
        ),
        "deep JSON": (say("[" * 50000), "not a whole checkpoint: its metadata are no JSON"),
        "nothing": (say('{"format": 3}'), "step must be int in a checkpoint's metadata, got None"),
        "later": (told(format=4), "must be a checkpoint of format 3, its metadata say .*4"),
        "step": (told(step=[40]), r"step must be int in a checkpoint's metadata, got \[40\]"),
        "sae": (told(sae=None), "sae must be dict .*got None"),
        "another's name": (told(step=41), "must be named checkpoint-000000041.safetensors"),
        "shape": (
            holding(lambda t: t.update({"sae.b_enc": torch.zeros(3)})),
            r"sae.b_enc must be float32 of shape \(48,\), got float32 of shape \(3,\)",
        ),
        "dtype": (
            holding(lambda t: t.update({"sae.b_enc": torch.zeros(M).double()})),
            r"sae.b_enc must be float32 of shape \(48,\), got float64",
        ),
        "missing": (holding(lambda t: t.pop("sae.b_dec")), "misses tensors: sae.b_dec"),
        "unknown": (holding(lambda t: t.update(y=torch.ones(1))), "holds unknown tensors: y"),
    }


@pytest.mark.parametrize("kind", broken_checkpoints())
def test_broken_checkpoints(config: TrainConfig, finished: Path, kind: str) -> None:
    shutil.copytree(finished, config.output)
    path = Path(config.output) / "checkpoint-000000040.safetensors"
    damage, message = broken_checkpoints()[kind]
    damage(path)
    for use in (lambda: train(replace(config, steps=60)), lambda: load_sae(path)):
        with pytest.raises(ValueError, match=f"{path.name}: .*{message}"):
            use()
    path.unlink()  # what the user can do: fall back to the one before
    train(replace(config, steps=60))


def test_a_folder_where_a_checkpoint_is_to_be(config: TrainConfig) -> None:
    first = train(replace(config, steps=15)).checkpoint

    def obstruct(metrics: Metrics) -> None:
        if metrics.step == 20:
            first.with_name("checkpoint-000000030.safetensors").mkdir()

    # It may appear in the midst of a run, or be there before.
    with pytest.raises(
        OSError, match=r"030.safetensors: the checkpoint could not be .*newest whole one is .*015"
    ):
        train(config, on_metrics=obstruct)
    for use in (lambda: train(config), lambda: load_sae(config.output)):
        with pytest.raises(ValueError, match=r"030.safetensors: must be a checkpoint, got a folder"):
            use()


@pytest.mark.parametrize(
    ("room", "message"),
    [
        (None, r"log.jsonl: the log could not be written: .*File too large"),
        (8192, r"checkpoint-000000030.*could not be written.*newest whole.*-000000015"),
    ],
)
def test_full_disk(config: TrainConfig, finished: Path, room: int | None, message: str) -> None:
    """A file size limit makes the real writer fail in the midst of a write, as a full disk would."""
    first = train(replace(config, steps=15))
    kept, limits = first.checkpoint.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room or first.log.stat().st_size + 50, limits[1]))
    try:
        with pytest.raises(OSError, match=message):
            train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(config.output) == [first.checkpoint.name, "log.jsonl"]
    assert first.checkpoint.read_bytes() == kept
    assert_same_run(train(config).log.parent, finished)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_full_disk_at_the_last_moment(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    first = train(replace(config, steps=15)).checkpoint

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_module.os, function, full)
    with pytest.raises(OSError, match=r"No space left on device"):
        train(config)
    assert names(config.output) == [first.name, "log.jsonl"]


@pytest.mark.parametrize("notes", ["notes", '"step"', "[" * 50000])
def test_a_foreign_log_is_not_cut(config: TrainConfig, notes: str) -> None:
    log = Path(config.output) / "log.jsonl"
    log.parent.mkdir()
    log.write_text(f"{notes}\n")
    message = f"log.jsonl: line 1 is no record of a training log: b'{re.escape(notes[:80])}"
    with pytest.raises(ValueError, match=message):
        train(config)
    assert log.read_text() == f"{notes}\n"


def test_one_run_a_folder(config: TrainConfig) -> None:
    refused = []

    def second(metrics: Metrics) -> None:
        with pytest.raises(BlockingIOError, match="another run is using this output folder"):
            train(config)
        refused.append(metrics.step)

    train(replace(config, steps=5), on_metrics=second)
    assert refused == [5]


def test_outside_the_main_thread(config: TrainConfig) -> None:
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(train, config).result().metrics.step == 40


def test_no_thread_or_file_is_left_behind(config: TrainConfig) -> None:
    def state() -> tuple[int, set[str]]:
        alive = {thread.name for thread in threading.enumerate() if thread.name.startswith("fastsparse")}
        return len(os.listdir("/proc/self/fd")), alive

    train(replace(config, steps=1))
    gc.collect()  # what earlier tests' exceptions still hold
    before = state()
    with pytest.raises(TrainingInterrupted):
        train(config, on_metrics=interrupt_at(10))
    deadline = time.monotonic() + 10
    while state()[1] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state() == before


def test_non_finite_activations_stop_the_run(config: TrainConfig, data: str, tmp_path: Path) -> None:
    x = np.load(f"{data}/a.npy")
    x[500, 3] = np.nan
    np.save(tmp_path / "nan.npy", x)
    broken = replace(config, data=[str(tmp_path / "nan.npy")], checkpoint_every=1)
    with pytest.raises(FloatingPointError, match=r"step \d+: the loss is nan: the activations hold NaN"):
        train(broken)
    for name in names(config.output):
        if name.startswith("checkpoint"):
            assert load_sae(Path(config.output) / name).W_enc.isfinite().all()


@pytest.mark.parametrize("model", ["topk", "batchtopk", "mp"])
def test_checkpoints_of_what_is_not_finite_are_not_written(
    config: TrainConfig, data: str, tmp_path: Path, model: str
) -> None:
    """At this scale the loss is finite, and its gradient's square is not."""
    np.save(tmp_path / "small.npy", np.load(f"{data}/a.npy") * np.float32(1e-19))
    small = replace(config, model=model, data=[str(tmp_path / "small.npy")], checkpoint_every=1)
    with pytest.raises(
        FloatingPointError, match=r"step 2: the loss is finite, but adam.exp_avg_sq.* hold NaN or"
    ):
        train(small)
    assert names(config.output) == ["checkpoint-000000001.safetensors", "log.jsonl"]
    assert all(tensor.isfinite().all() for tensor in load_sae(config.output).state_dict().values())


@pytest.mark.parametrize("shard", ["a.npy", "b.safetensors"])
def test_a_shard_that_is_cut_meanwhile(config: TrainConfig, data: str, tmp_path: Path, shard: str) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "copy"))

    def cut(metrics: Metrics) -> None:
        if metrics.step == 20:
            os.truncate(copy / shard, 4096)

    with pytest.raises(OSError, match=rf"data: can't be read any more: .*{shard}: not a whole"):
        train(replace(config, data=[str(copy)], steps=1000), on_metrics=cut)
    assert load_sae(config.output).k == K


@pytest.mark.parametrize(
    ("source", "output"), [("", ""), ("*", "sub/run"), ("**/*.safetensors", "sub/run"), ("**/*", "")]
)
def test_output_inside_the_data(
    config: TrainConfig, data: str, tmp_path: Path, source: str, output: str
) -> None:
    """What a run writes is no shard: neither in its first process nor in any later one."""
    shutil.copy(f"{data}/b.safetensors", tmp_path)
    inside = replace(config, data=[str(tmp_path / source)], output=str(tmp_path / output), tensor="x")
    train(replace(inside, steps=15))
    (tmp_path / output / "checkpoint.partial").mkdir()  # as a killed run leaves it
    (tmp_path / output / "checkpoint.partial" / "checkpoint-000000030.safetensors").write_bytes(b"half")
    named = replace(inside, data=[*inside.data, inside.output])  # as a shell resolves a glob by then
    outside = replace(config, data=[str(tmp_path / "b.safetensors")], output=str(tmp_path / "o"), tensor="x")
    assert_same_run(train(named).log.parent, train(outside).log.parent)


def test_schedule() -> None:
    config = TrainConfig(
        data=["x"], output="y", num_latents=2**12, options={"k": 1}, steps=10, warmup_steps=4, decay_steps=2
    )
    assert config.learning_rate == 4e-4
    rates = [config.rate_at(step) / 4e-4 for step in range(1, 11)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 2 / 3, 1 / 3])


def test_bf16(config: TrainConfig) -> None:
    result = train(replace(config, bf16=True, steps=150))
    assert result.sae.W_enc.dtype == torch.float32
    assert result.metrics.fvu < 0.5


def test_the_rate_reaches_the_optimiser(config: TrainConfig) -> None:
    """Adam's first steps move every parameter that has a gradient by the rate, whatever the gradient."""
    frozen = train(replace(config, lr=0.0, steps=3)).sae
    begun = TopKSAE(D, M, K, generator=torch.Generator().manual_seed(0))
    assert torch.equal(frozen.W_enc, begun.W_enc)
    moved = train(replace(config, lr=0.01, steps=1, output=config.output + "-moved")).sae
    change = (moved.W_enc - begun.W_enc).abs()
    torch.testing.assert_close(change.max().item(), 0.01, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "omp"}, ValueError, f"model: must be one of {', '.join(MODELS)}, got 'omp'"),
        ({"options": {"k": 49}}, ValueError, r"TopKSAE: k must be at most num_latents \(48\), got k=49"),
        ({"options": {"k": 1.5}}, TypeError, r"k: must be int, got 1.5"),
        ({"options": {}}, ValueError, r"options: the model topk must be given k, got \[\]"),
        ({"options": ["k", 3]}, TypeError, r"options: must map names to values, got \['k', 3\]"),
        (
            {"options": {"k": 3, "nonnegative": True}},
            ValueError,
            r"options: those of the model topk are k, activation, .*, got 'nonnegative'",
        ),
        (
            {"options": {"k": 3, "prefixes": [8, 1.5]}},
            TypeError,
            r"prefixes: must be a list of int, got \[8, 1.5\]",
        ),
        (
            {"options": {"k": 3, "prefix_weights": 1.0}},
            TypeError,
            "prefix_weights: must be a list of float or int or None, got 1.0",
        ),
        ({"num_latents": True}, TypeError, "num_latents: must be int, got True"),
        ({"lr": float("nan")}, ValueError, "lr: must be finite"),
        ({"lr": "fast"}, TypeError, r"lr: must be float or int or None, got 'fast'"),
        ({"steps": 0}, ValueError, "steps: must be at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed: must be at least 0, got -1"),
        ({"device": "tpu"}, ValueError, "device: must be auto, cpu, cuda or cuda:<number>, got 'tpu'"),
        ({"device": "cuda:-1"}, ValueError, "device: must be auto, cpu, cuda or .*, got 'cuda:-1'"),
        ({"data": "folder"}, TypeError, "data: must be a list of str, got 'folder'"),
        ({"warmup_steps": 30, "decay_steps": 11}, ValueError, r"must be at most steps \(40\), got 30 \+ 11"),
        ({"batch_size": 2001}, ValueError, r"batch_size: must be at most .*\(2000\), got 2001"),
    ],
)
def test_bad_configurations(config: TrainConfig, change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        train(replace(config, **change))
    assert not Path(config.output).exists()


@pytest.mark.parametrize("model", CASES)
def test_options_are_those_of_the_constructor_with_the_help_of_its_docstring(model: str) -> None:
    of_the_run = {about.name for about in fields(TrainConfig)}
    for about in fields(options_of(model)):
        assert about.metadata["help"], about.name
        assert about.name not in of_the_run
    sizes = {"d_model", "num_latents", "device", "dtype", "generator"}
    sizes |= {"d_in", "d_out", "num_sources", "num_layers", "num_modalities"}
    names = {about.name for about in fields(options_of(model))}
    assert names == signature(CASES[model].kind).parameters.keys() - sizes
    assert options_of("mp").__doc__.startswith("A sparse autoencoder that describes every token in steps")
    dead_after = next(about for about in fields(options_of("topk")) if about.name == "dead_after")
    told = "a latent is dead when it has not been positive for this many tokens"
    assert (dead_after.metadata["help"], dead_after.default, dead_after.type) == (told, 10_000_000, int)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_not_silently_replaced(config: TrainConfig) -> None:
    for device in ("cuda", "cuda:1"):
        with pytest.raises(RuntimeError, match=f"device: {device} was asked for and can't be used"):
            train(replace(config, device=device))


def test_one_gpu_of_several(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert resolved_device("cuda:1") == torch.device("cuda:1")
    assert replace(config, device="cuda:1").result_fields()["device"] == "cuda"  # it may go on on another
    with pytest.raises(
        RuntimeError, match=r"cuda:2 was asked for and can't be used: there are 2, numbered from 0"
    ):
        resolved_device("cuda:2")
