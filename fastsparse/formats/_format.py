"""What a format is, and how its files are written."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fastsparse._extras import lacking, missing
from fastsparse._files import replacing
from fastsparse.formats._place import Asked, Place
from fastsparse.nn import Model


class Format(NamedTuple):
    """One layout of files.

    Attributes:
        files: what it is recognised by, in words.
        recognises: whether a place holds it, by the names of the files.
        load: the model.
        save: a model into a folder; None where that isn't offered.
    """

    files: str
    recognises: Callable[[Place], bool]
    load: Callable[[Place, Asked], Model]
    save: Callable[[Model, Path], None] | None = None


def write(
    folder: Path, weights: str, tensors: Mapping[str, Tensor], config: str, options: Mapping[str, Any]
) -> None:
    """Write two files, each whole or not at all, and never one model's weights beside another's options.

    A process that is killed at the wrong moment leaves weights without options, which can't be loaded.

    Raises:
        ModuleNotFoundError: safetensors is not installed.
        OSError: the folder can't be written to; what was there before is untouched.
        ValueError: a tensor is sharded.
    """
    if package := missing("safetensors"):
        raise lacking("fastsparse.formats", package, "train")
    from safetensors.torch import save

    for name, tensor in tensors.items():
        if hasattr(tensor, "placements"):  # a DTensor
            raise ValueError(f"save: {name} must be gathered first, got {tuple(tensor.placements)}")
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    text = json.dumps(options, indent=2, default=lambda value: value.item()) + "\n"  # of NumPy or PyTorch
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / config) as told, replacing(folder / weights) as held:  # the latter appears first
        told.write(text.encode())
        told.flush()
        held.write(data)
        held.flush()
        (folder / config).unlink(missing_ok=True)
