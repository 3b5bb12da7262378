"""Training runs for tests/train/test_kill.py, importable by the processes that are to be killed."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from fastsparse.train import TrainConfig, train
from fastsparse.train import checkpoint as checkpoint_module


def plainly(config: TrainConfig) -> None:
    # By default tqdm's lock is a named semaphore, which a killed process of this kind leaves behind.
    tqdm.set_lock(threading.RLock())
    train(config)


def slowly(config: TrainConfig) -> None:
    """Train with pauses, so that the killer can keep up on a busy machine."""
    tqdm.set_lock(threading.RLock())
    train(config, on_metrics=lambda metrics: time.sleep(0.004))


def die_in(config: TrainConfig, place: str) -> None:
    """Train until the third checkpoint is being written, and die right there."""
    done = 0

    def count(last_act: Callable[[], None] = lambda: None) -> None:
        nonlocal done
        done += 1
        if done == 3:
            last_act()
            os.kill(os.getpid(), signal.SIGKILL)

    if place == "half-written":
        whole_save = checkpoint_module.save_file

        def save_file(tensors: dict, path: Path, metadata: dict) -> None:
            whole_save(tensors, path, metadata)
            count(lambda: os.truncate(path, os.path.getsize(path) // 2))

        checkpoint_module.save_file = save_file
    elif place == "before the rename":
        rename = os.replace
        checkpoint_module.os.replace = lambda *arguments: (count(), rename(*arguments))
    elif place == "before old ones are removed":
        unlink = Path.unlink
        Path.unlink = lambda path, **options: (
            path.suffix == ".safetensors" and count(),
            unlink(path, **options),
        )
    else:
        raise AssertionError(place)
    plainly(config)
