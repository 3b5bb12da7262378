"""kill -9 at random and at the worst moments: a run that was killed ends as one that never was, bit for bit.

Runs are processes of their own, forked from a server that has imported everything, so that many are cheap.
"""

import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.context import BaseContext
from pathlib import Path

import numpy as np
import pytest
import torch
from killable import die_in, plainly, slowly
from train.runs import assert_same_run, records

from fastsparse.train import TrainConfig

STEPS = 160
KILLS = 12


@pytest.fixture(scope="module")
def processes() -> BaseContext:
    context = multiprocessing.get_context("forkserver")
    # PyTorch's optimisers import torch._dynamo in their first step, which takes seconds.
    context.set_forkserver_preload(["fastsparse.train", "torch._dynamo"])
    return context


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainConfig]:
    # In memory where possible: fsync is for power cuts, is slow on a disk, and makes no difference to a kill.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path_factory.getbasetemp()
    folder = Path(tempfile.mkdtemp(prefix="fastsparse-test-", dir=memory))
    generator = torch.Generator().manual_seed(0)
    for shard in range(3):
        np.save(folder / f"{shard}.npy", torch.randn(300, 8, generator=generator).numpy())
    yield TrainConfig(
        data=[str(folder / "*.npy")], output=str(folder / "whole"), num_latents=32, steps=STEPS,
        options={"k": 2, "dead_after": 200}, batch_size=32, warmup_steps=20, decay_steps=50, block_tokens=8,
        buffer_tokens=128, log_every=1, checkpoint_every=2, device="cpu",
    )  # fmt: skip
    shutil.rmtree(folder)


def ended(processes: BaseContext, target: Callable, *arguments: object) -> int:
    """The exit code of a process."""
    run = processes.Process(target=target, args=arguments)
    run.start()
    run.join(120)
    return run.exitcode


@pytest.fixture(scope="module")
def whole(config: TrainConfig, processes: BaseContext) -> Path:
    """The folder of an uninterrupted run."""
    assert ended(processes, plainly, config) == 0
    return Path(config.output)


def last_step(folder: Path) -> int:
    try:
        return folder.joinpath("log.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def assert_same(folder: Path, whole: Path) -> None:
    assert_same_run(folder, whole)
    assert [line["step"] for line in records(folder / "log.jsonl")] == list(range(1, STEPS + 1))
    assert sorted(os.listdir(folder)) == sorted(os.listdir(whole))


def moments(rng: random.Random) -> Iterator[tuple[int, float]]:
    """(step to wait for, seconds to wait then): all over the run, the start of a process included."""
    for kill in range(KILLS):
        if kill % 4 == 0:
            yield 0, rng.uniform(0, 0.4)  # while it reads the checkpoint, cuts the log, fills the buffer
        else:
            yield kill * STEPS // (KILLS + 2), rng.uniform(0, 0.02)


def test_kills_at_random_moments(config: TrainConfig, whole: Path, processes: BaseContext) -> None:
    folder = whole.parent / "random"
    config = replace(config, output=str(folder))
    kills = 0
    for step, pause in moments(random.Random(0)):
        run = processes.Process(target=slowly, args=(config,))
        run.start()
        deadline = time.monotonic() + 60
        while last_step(folder) < step and run.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(pause)
        run.kill()
        run.join()
        assert run.exitcode in (-signal.SIGKILL, 0)
        kills += run.exitcode == -signal.SIGKILL
    assert kills >= 9
    assert ended(processes, plainly, config) == 0
    assert_same(folder, whole)


@pytest.mark.parametrize("place", ["half-written", "before the rename", "before old ones are removed"])
def test_kills_at_the_worst_moments(
    config: TrainConfig, whole: Path, processes: BaseContext, place: str
) -> None:
    folder = whole.parent / place.replace(" ", "-")
    config = replace(config, output=str(folder))
    assert ended(processes, die_in, config, place) == -signal.SIGKILL
    checkpoints = [name for name in os.listdir(folder) if name.endswith(".safetensors")]
    assert 0 < len(checkpoints) <= 3
    assert (folder / "checkpoint.partial").exists() == (place != "before old ones are removed")
    assert ended(processes, plainly, config) == 0
    assert_same(folder, whole)
