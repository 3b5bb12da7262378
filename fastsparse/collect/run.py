"""Collecting: from files of text to shards of activations, piece by piece."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastsparse._files import locked
from fastsparse._settings import differences, resolved_device
from fastsparse.collect.config import CollectConfig
from fastsparse.collect.folder import Folder
from fastsparse.collect.reader import Reader
from fastsparse.collect.texts import Window, documents, files, windows


@dataclass(frozen=True)
class Collection:
    """What :func:`collect` leaves.

    Attributes:
        path: the folder, which ``fastsparse train`` takes.
        tokens: rows of its shards; held_out: those in ``held_out/``.
        shape: of a row, (D,), or (L, D) of several places.
    """

    path: Path
    tokens: int
    held_out: int
    shape: tuple[int, ...]

    def summary(self) -> str:
        """What came of it, in lines for a terminal."""
        shape = " x ".join(map(str, self.shape))
        rows = f"{self.tokens:,} tokens to train on, {self.held_out:,} held out, of width {shape}"
        return f"{rows}\nactivations: {self.path}"


def collect(config: CollectConfig) -> Collection:
    """Keep a model's activations on text, or go on where an earlier call stopped.

    A collection that was killed, at any moment, and started again has the same files, byte for byte, as one
    that never was (on the same machine and libraries, with the same number of threads): text is cut into
    pieces, each is written whole or not at all, and batches don't reach from one into the next.

    Args:
        config: which model, what of it, on which text.

    Returns:
        :class:`Collection`.

    Raises:
        FileNotFoundError: there is no such text.
        OSError: there is no such model on this disk, the disk is full, or another process uses the folder.
        ValueError: the model has no such layer or module, a file isn't what it should be, there is no text in
            the files, or the folder holds another collection.
        FloatingPointError: an activation is not finite in the dtype of the shards.
        ModuleNotFoundError: there is a .parquet file, and pyarrow is not there.
        RuntimeError: CUDA was asked for and can't be used.
    """
    paths = files(config.texts)
    reader = Reader(config.model, config.layer, config.module, config.side, resolved_device(config.device))
    special = sum(map(len, reader.frame))
    longest = reader.longest or config.context
    if not special < config.context <= longest:
        raise ValueError(
            f"context: must be between {special + 1} and the {longest} tokens that the model reads, "
            f"got {config.context}"
        )
    texts = [[path.name, path.stat().st_size] for path in paths]
    recipe = {"settings": config.result_fields(), "from": {"model": reader.fingerprint, "texts": texts}}
    recipe = json.loads(json.dumps(recipe))  # as the folder tells it: lists, no tuples
    folder = Folder(Path(config.output), config.dtype)
    folder.path.mkdir(parents=True, exist_ok=True)
    with locked(folder.path):
        if folder.begun():
            before = folder.recipe()
            for part in recipe:
                differences(before[part], recipe[part], str(folder.path))
        else:
            folder.say(recipe)
        if not folder.recipe().get("finished"):
            _collect(config, paths, reader, config.context - special, folder)
            folder.say(recipe | {"finished": _counted(folder)})
        found = folder.recipe()["finished"]
        return Collection(folder.path, found["tokens"], found["held_out"], tuple(found["shape"]))


def _collect(config: CollectConfig, paths: list[Path], reader: Reader, size: int, folder: Folder) -> None:
    """Write the pieces that there aren't."""
    whole = folder.pieces()
    last = folder.windows(whole - 1)[-1] if whole else None
    texts = documents(paths, config.field, config.label)
    ahead = windows(texts, reader.tokenize, size, held_out_every=config.held_out_every, after=last)
    if config.max_tokens is not None:
        ahead = takewhile(lambda window: window.end <= config.max_tokens, ahead)
    dtype = getattr(torch, config.dtype)
    bar = tqdm(
        total=config.max_tokens, initial=last.end if last else 0, unit="token", unit_scale=True,
        disable=None, dynamic_ncols=True,
    )  # fmt: skip
    with bar:
        for number in count(whole):
            piece = list(_piece(ahead, config.shard_tokens))
            if not piece:
                break
            rows = []
            for start in range(0, len(piece), config.batch_size):
                batch = piece[start : start + config.batch_size]
                rows += [row.to(dtype) for row in reader.read(batch)]
                bar.update(sum(len(window.ids) for window in batch))
            if not all(row.isfinite().all() for row in rows):
                raise FloatingPointError(
                    f"{folder.path}: piece {number}: the activations hold NaN or infinities in {config.dtype}"
                )
            folder.write(number, piece, rows)


def _piece(ahead: Iterator[Window], tokens: int) -> Iterator[Window]:
    """The next windows, until they hold so many tokens."""
    for window in ahead:
        yield window
        tokens -= len(window.ids)
        if tokens <= 0:
            return


def _counted(folder: Folder) -> dict[str, Any]:
    numbers = range(folder.pieces())
    if not numbers:
        raise ValueError("texts: must hold at least one window of tokens, got none")
    rows = max((folder.rows(0, held_out=held_out) for held_out in (False, True)), key=len)
    lengths = Counter()
    for number in numbers:
        for window in folder.windows(number):
            lengths[window.held_out] += len(window.ids)
    return {"tokens": lengths[False], "held_out": lengths[True], "shape": list(rows.shape[1:])}
