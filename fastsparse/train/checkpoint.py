"""Checkpoints: one safetensors file each, written whole or not at all, and checked before they are used.

Tensors: ``sae.<parameter or buffer>`` and ``adam.<state>.<parameter>``. The header's metadata holds one JSON
object under ``fastsparse``: format version, step, configuration, the shards' names and sizes. There is no
generator state to keep: the order of the data is a function of the seed and the step (see stream.py).
"""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastsparse.nn import SparseAutoencoder
from fastsparse.train.config import MODELS

VERSION = 1
_NAME = re.compile(r"checkpoint-(\d{9,})\.safetensors")
_PARTIAL = "checkpoint.partial"  # a folder: safetensors writes a temporary file of its own beside its target


class Checkpoint(NamedTuple):
    """A file's contents: the metadata and all tensors, on the CPU."""

    path: Path
    step: int
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def save(
    folder: Path,
    step: int,
    sae: SparseAutoencoder,
    optimizer: torch.optim.Optimizer,
    details: dict,
    keep: int,
) -> Path:
    """Write a checkpoint, then remove all but the newest ``keep``.

    The file appears under its name only when it is whole and on the disk: killed at any moment, a run leaves
    the checkpoints that it had, and at most a folder of what it was writing, which the next one removes.

    Raises:
        OSError: the disk is full, or can't be written to; earlier checkpoints are untouched.
    """
    target = folder / f"checkpoint-{step:09d}.safetensors"
    remove_partial(folder)
    partial = folder / _PARTIAL / target.name
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _state(sae, optimizer).items()}
    metadata = {"format": VERSION, "step": step, **details}
    try:
        partial.parent.mkdir()
        try:
            save_file(tensors, partial, {"fastsparse": json.dumps(metadata)})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        _sync(partial)
        os.replace(partial, target)
    except OSError as error:
        kept = checkpoints(folder)
        newest = f"the newest whole one is {kept[-1]}" if kept else "there is none before it"
        raise OSError(f"{target}: the checkpoint could not be written: {error}; {newest}") from error
    finally:
        remove_partial(folder)
    _sync(folder)
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return target


def remove_partial(folder: Path) -> None:
    """Remove what a killed run left half-written."""
    shutil.rmtree(folder / _PARTIAL, ignore_errors=True)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        ValueError: the file is truncated, or no checkpoint of this format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("fastsparse", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a whole checkpoint: {error}") from error
    found = metadata.get("format") if isinstance(metadata, dict) else None
    if found != VERSION or not metadata.keys() >= {"step", "config", "shards", "sae"}:
        raise ValueError(f"{path}: must be a training checkpoint of format {VERSION}, got format {found}")
    return Checkpoint(path, metadata["step"], metadata, tensors)


def restore(checkpoint: Checkpoint, sae: SparseAutoencoder, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors in place.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape or dtype; nothing is changed then.
    """
    for parameter in sae.parameters():  # the optimiser makes its state in its first step: make room for it
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    _copy(checkpoint, _state(sae, optimizer))


def load_sae(path: str | Path, *, device: torch.device | str = "cpu") -> SparseAutoencoder:
    """Load the trained autoencoder from a checkpoint, in evaluation mode.

    Args:
        path: a ``checkpoint-*.safetensors`` file, or the folder of a run, for its newest one.
        device: where to put it.

    Returns:
        The :class:`fastsparse.nn.TopKSAE` or :class:`fastsparse.nn.MatchingPursuitSAE`.

    Raises:
        FileNotFoundError: there is no such file, or no checkpoint in the folder.
        ValueError: the file is truncated or no checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        found = checkpoints(path)
        if not found:
            raise FileNotFoundError(f"{path}: the folder holds no checkpoint-*.safetensors")
        path = found[-1]
    checkpoint = load(path)
    model = checkpoint.metadata["config"]["model"]
    if model not in MODELS:
        raise ValueError(f"{path}: model must be one of {', '.join(MODELS)}, got {model!r}")
    sae = MODELS[model](**checkpoint.metadata["sae"])
    _copy(checkpoint, _sae_state(sae), ignore="adam.")
    return sae.to(device).eval()


def _sae_state(sae: SparseAutoencoder) -> dict[str, Tensor]:
    return {f"sae.{name}": tensor for name, tensor in sae.state_dict().items()}


def _state(sae: SparseAutoencoder, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = _sae_state(sae)
    for name, parameter in sae.named_parameters():
        state |= {f"adam.{key}.{name}": tensor for key, tensor in optimizer.state[parameter].items()}
    return state


@torch.no_grad()
def _copy(checkpoint: Checkpoint, state: dict[str, Tensor], ignore: str | None = None) -> None:
    path = checkpoint.path
    held = {name for name in checkpoint.tensors if ignore is None or not name.startswith(ignore)}
    _same_names(path, "misses", state.keys() - held)
    _same_names(path, "holds unknown", held - state.keys())
    for name, tensor in state.items():
        found = checkpoint.tensors[name]
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise ValueError(
                f"{path}: {name} must be {str(tensor.dtype)[6:]} of shape {tuple(tensor.shape)}, "
                f"got {str(found.dtype)[6:]} of shape {tuple(found.shape)}"
            )
    for name, tensor in state.items():
        tensor.copy_(checkpoint.tensors[name])


def _same_names(path: Path, problem: str, names: Iterable[str]) -> None:
    if names:
        raise ValueError(f"{path}: the checkpoint {problem} tensors: {', '.join(sorted(names))}")


def _sync(path: Path) -> None:
    """Have a file's or a folder's contents on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
