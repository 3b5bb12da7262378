"""Checkpoints: one safetensors file each, written whole or not at all, and checked before they are used.

Tensors: ``sae.<parameter or buffer>`` and ``adam.<state>.<parameter>``. The header's metadata holds one JSON
object under ``fastsparse``: format version, step, configuration, the shards' names and sizes, every tensor's
CRC-32; and under ``crc32`` that object's own. There is no generator state to keep: the order of the data is a
function of the seed and the step (see stream.py).
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fastsparse._files import DTYPES, Entry, File, safetensors_header, sync
from fastsparse.nn import Model
from fastsparse.train.models import MODELS

VERSION = 3
_FIELDS = {"step": int, "config": dict, "shards": list, "sae": dict, "crc32": dict}
_NAME = re.compile(r"checkpoint-(\d{9,})\.safetensors")
_PARTIAL = "checkpoint.partial"  # a folder: safetensors writes a temporary file of its own beside its target
_PIECE = (
    2**24
)  # bytes that are read at once, so that they are still in a cache when they are summed and copied


class Checkpoint(NamedTuple):
    """A file's header: the metadata, and where each tensor is."""

    path: Path
    step: int
    metadata: dict[str, Any]
    entries: dict[str, Entry]


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def is_own(folder: Path, path: Path) -> bool:
    """Whether a file is one that the run in ``folder`` writes: a checkpoint, whole or half-written."""
    home, place = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    whole = place.parent == home and _NAME.fullmatch(place.name) is not None
    return whole or place.parent == home / _PARTIAL


def save(
    folder: Path,
    step: int,
    sae: Model,
    optimizer: torch.optim.Optimizer,
    details: dict,
    keep: int,
) -> Path:
    """Write a checkpoint, then remove all but the newest ``keep`` of those up to it.

    The file appears under its name only when it is whole and on the disk: killed at any moment, a run leaves
    the checkpoints that it had, and at most a folder of what it was writing, which the next one removes.

    Raises:
        FloatingPointError: a tensor holds NaN or infinities; nothing is written.
        OSError: the disk is full, or can't be written to; earlier checkpoints are untouched.
    """
    target = folder / f"checkpoint-{step:09d}.safetensors"
    remove_partial(folder)
    partial = folder / _PARTIAL / target.name
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _state(sae, optimizer).items()}
    lost = [name for name, tensor in tensors.items() if not _finite(tensor)]
    if lost:
        raise FloatingPointError(
            f"step {step}: the loss is finite, but {', '.join(lost)} hold NaN or infinities after it: the "
            "activations are too large or too small for float32, or lr is too high; "
            f"no checkpoint was written, {_newest(folder)}"
        )
    try:
        partial.parent.mkdir()
        write(partial, tensors, {"format": VERSION, "step": step, **details})
        sync(partial)
        os.replace(partial, target)
    except OSError as error:
        raise OSError(f"{target}: the checkpoint could not be written: {error}; {_newest(folder)}") from error
    finally:
        remove_partial(folder)
    sync(folder)
    upto = checkpoints(folder)  # what claims a later step is not of this run's past, and not its to remove
    for old in upto[: upto.index(target) + 1][:-keep]:
        if old.is_file():
            old.unlink()
    return target


def write(path: Path, tensors: dict[str, Tensor], metadata: dict) -> None:
    """Write tensors, metadata, and the checksums of both.

    Raises:
        OSError: they can't be written.
    """
    sums = _in_parallel(lambda tensor: _sum(tensor.dtype, tensor.shape, [_bytes(tensor)]), tensors.values())
    text = json.dumps({**metadata, "crc32": dict(zip(tensors, sums, strict=True))})
    try:
        save_file(tensors, path, {"fastsparse": text, "crc32": str(zlib.crc32(text.encode()))})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def remove_partial(folder: Path) -> None:
    """Remove what a killed run left half-written."""
    shutil.rmtree(folder / _PARTIAL, ignore_errors=True)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint's header; its tensors are read when they are put in place.

    Raises:
        OSError: the file can't be read.
        ValueError: the file is truncated or damaged, no checkpoint of this format, or named for another step.
    """
    if path.is_dir():
        raise ValueError(f"{path}: must be a checkpoint, got a folder")
    with File(path) as file:
        entries, told = safetensors_header(file)
    metadata = _metadata(path, told)
    _same_names(path, entries.keys(), metadata["crc32"].keys())
    step, name = metadata["step"], _NAME.fullmatch(path.name)
    if name and int(name[1]) != step:
        raise ValueError(
            f"{path}: must be named checkpoint-{step:09d}.safetensors, since it was written after step {step}"
        )
    return Checkpoint(path, step, metadata, entries)


def _metadata(path: Path, told: dict[str, str]) -> dict[str, Any]:
    """What a header says beside the tensors."""
    text = told.get("fastsparse", "")
    if told.get("crc32") != str(zlib.crc32(text.encode(errors="replace"))):
        raise ValueError(
            f"{path}: not a whole checkpoint of format {VERSION}: its metadata fail their checksum"
        )
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a whole checkpoint: its metadata are no JSON") from error
    if not isinstance(metadata, dict) or metadata.get("format") != VERSION:
        raise ValueError(f"{path}: must be a checkpoint of format {VERSION}, its metadata say {text[:80]}")
    for name, kind in _FIELDS.items():
        found = metadata.get(name)
        if type(found) is not kind:
            raise ValueError(
                f"{path}: {name} must be {kind.__name__} in a checkpoint's metadata, got {found!r:.80}"
            )
    return metadata


def restore(checkpoint: Checkpoint, sae: Model, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors in place.

    Raises:
        OSError: the file can't be read any more.
        ValueError: a tensor is missing, unknown, of another shape or dtype, or not what was written; what is
            in place then is of no use.
    """
    for name, parameter in sae.named_parameters():
        if f"adam.step.{name}" in checkpoint.entries:  # it has had a gradient: make room for what came of it
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    _copy(checkpoint, _state(sae, optimizer))


def load_sae(path: str | Path, *, device: torch.device | str = "cpu") -> Model:
    """Load the trained autoencoder from a checkpoint, in evaluation mode.

    Args:
        path: a ``checkpoint-*.safetensors`` file, or the folder of a run, for its newest one.
        device: where to put it.

    Returns:
        The autoencoder, of one of the classes in :mod:`fastsparse.nn`.

    Raises:
        FileNotFoundError: there is no such file, or no checkpoint in the folder.
        OSError: the file can't be read.
        ValueError: the file is truncated, damaged or no checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        found = checkpoints(path)
        if not found:
            raise FileNotFoundError(f"{path}: the folder holds no checkpoint-*.safetensors")
        path = found[-1]
    checkpoint = load(path)
    model = checkpoint.metadata["config"].get("model")
    if model not in tuple(MODELS):
        raise ValueError(f"{path}: model must be one of {', '.join(MODELS)}, got {model!r}")
    try:
        sae = MODELS[model](**checkpoint.metadata["sae"])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: sae must hold the sizes and options of a {model} model: {error}"
        ) from error
    _copy(checkpoint, _sae_state(sae), ignore="adam.")
    return sae.to(device).eval()


def _sae_state(sae: Model) -> dict[str, Tensor]:
    return {f"sae.{name}": tensor for name, tensor in sae.state_dict().items()}


def _state(sae: Model, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = _sae_state(sae)
    for name, parameter in sae.named_parameters():
        state |= {f"adam.{key}.{name}": tensor for key, tensor in optimizer.state[parameter].items()}
    return state


def _copy(checkpoint: Checkpoint, state: dict[str, Tensor], ignore: str | None = None) -> None:
    """Put tensors in place that have the right names, shapes and dtypes; sum all, those to ignore too."""
    path = checkpoint.path
    held = {name for name in checkpoint.entries if ignore is None or not name.startswith(ignore)}
    _same_names(path, held, state.keys())
    for name, tensor in state.items():
        found = checkpoint.entries[name]
        dtype = DTYPES.get(found.dtype, found.dtype)
        if found.shape != tensor.shape or dtype != tensor.dtype:
            raise ValueError(
                f"{path}: {name} must be {str(tensor.dtype)[6:]} of shape {tuple(tensor.shape)}, "
                f"got {str(dtype).removeprefix('torch.')} of shape {found.shape}"
            )
    with File(path) as file:
        _in_parallel(lambda name: _read(file, checkpoint, name, state.get(name)), checkpoint.entries)


def _read(file: File, checkpoint: Checkpoint, name: str, out: Tensor | None) -> None:
    """Read a tensor, into ``out`` where there is one, and check its sum."""
    entry = checkpoint.entries[name]
    places = None if out is None else out.detach().view(-1).view(torch.uint8)

    def pieces() -> Iterator[np.ndarray]:
        memory = torch.empty(min(entry.size, _PIECE), dtype=torch.uint8)
        for begin in range(0, entry.size, _PIECE):
            piece = memory[: entry.size - begin]
            file.fill(piece.numpy().data, entry.offset + begin)
            if places is not None:
                places[begin : begin + len(piece)] = piece
            yield piece.numpy()

    if _sum(DTYPES.get(entry.dtype), entry.shape, pieces()) != checkpoint.metadata["crc32"][name]:
        raise ValueError(f"{checkpoint.path}: not a whole checkpoint: {name} is not what was written")


def _sum(dtype: torch.dtype | None, shape: tuple[int, ...], pieces: Iterable[np.ndarray]) -> int:
    """CRC-32 of a tensor's dtype, shape and bytes: 2.3 GB/s on a core, beside a disk's 1 to 3."""
    total = zlib.crc32(f"{dtype} {tuple(shape)}".encode())
    for piece in pieces:
        total = zlib.crc32(piece, total)
    return total


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.view(-1).view(torch.uint8).numpy()


def _finite(tensor: Tensor) -> bool:
    return all(bound.isfinite() for bound in tensor.aminmax())  # a NaN is both its bounds


def _in_parallel(function: Callable, items: Iterable) -> list:
    with ThreadPoolExecutor(thread_name_prefix="fastsparse-checkpoint") as threads:
        return list(threads.map(function, items))


def _newest(folder: Path) -> str:
    kept = [path for path in checkpoints(folder) if path.is_file()]
    return f"the newest whole one is {kept[-1]}" if kept else "there is none before it"


def _same_names(path: Path, names: Iterable[str], wanted: Iterable[str]) -> None:
    for problem, those in (("misses", wanted - names), ("holds unknown", names - wanted)):
        if those:
            raise ValueError(f"{path}: the checkpoint {problem} tensors: {', '.join(sorted(those))}")
