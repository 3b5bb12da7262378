"""Activations on disk: any number of ``.npy`` and ``.safetensors`` files, read by ranges of rows."""

import glob
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
    "f4": torch.float32, "f2": torch.float16, "f8": torch.float64,
}  # fmt: skip
SUFFIXES = (".npy", ".safetensors")


class Shard(NamedTuple):
    """One file's activations: ``tensor`` names the array inside a safetensors file."""

    path: Path
    tensor: str | None
    rows: int
    width: int
    dtype: torch.dtype


class Shards:
    """All activations of a run, as one matrix of rows that is read a range at a time.

    Files are mapped, not loaded; a few stay open. Every file's header is checked here, before any training.

    Args:
        sources: files, folders (their shards, by name; not those of folders within) and globs, in order.
        tensor: which tensor to read in safetensors files with several.

    Raises:
        FileNotFoundError: a source is missing or holds no shard.
        ValueError: a file is no shard, or widths differ.
    """

    def __init__(self, sources: Iterable[str], tensor: str | None = None) -> None:
        self.shards = [_describe(path, tensor) for path in _expand(sources)]
        first = self.shards[0]
        for shard in self.shards:
            if shard.width != first.width:
                raise ValueError(
                    f"{shard.path}: every shard must have the width of the first, {first.path} "
                    f"(D = {first.width}), got D = {shard.width}"
                )
        self.shards = [shard for shard in self.shards if shard.rows]
        if not self.shards:
            raise ValueError(
                f"data: the shards must hold at least one token, {first.path} and others hold none"
            )
        self.width = first.width
        self.rows = sum(shard.rows for shard in self.shards)
        self.dtype = first.dtype
        for shard in self.shards:
            self.dtype = torch.promote_types(self.dtype, shard.dtype)
        # Every memory map holds a file descriptor, and a run may have more shards than the system allows.
        self._open = lru_cache(maxsize=32)(_open)

    def fingerprint(self) -> list[list]:
        """What must be the same in a resumed run: each shard's name, rows and dtype, in order."""
        return [[shard.path.name, shard.rows, str(shard.dtype)[6:]] for shard in self.shards]

    def read(self, shard: Shard, start: int, stop: int, out: Tensor, positions: np.ndarray) -> None:
        """Copy rows [start, stop) of one shard to ``out[positions]``."""
        try:
            rows = self._open(shard)[start:stop]
        except (OSError, SafetensorError, ValueError) as error:
            raise OSError(f"{shard.path}: can't be read any more: {error}") from error
        if isinstance(rows, Tensor):
            out[torch.from_numpy(positions)] = rows.to(out.dtype)
        else:
            out.numpy()[positions] = rows  # in any byte order; NumPy has no bfloat16, so neither has `out`


def _expand(sources: Iterable[str]) -> list[Path]:
    """Files, each once."""
    found: dict[Path, None] = {}
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            here = sorted(item for item in path.iterdir() if item.suffix in SUFFIXES and item.is_file())
            problem = f"{source}: the folder holds no .npy or .safetensors file"
        elif path.exists():
            here, problem = [path], ""
        else:
            here = sorted(Path(item) for item in glob.glob(str(path), recursive=True))
            problem = f"{source}: no such file or folder, and no file matches it as a glob"
        if not here:
            raise FileNotFoundError(problem)
        found.update(dict.fromkeys(here))
    if not found:
        raise ValueError("data: must name at least one file, folder or glob, got none")
    return list(found)


def _describe(path: Path, tensor: str | None) -> Shard:
    """Read a file's header."""
    if path.suffix == ".npy":
        array = _open_npy(path)
        shape, kind = array.shape, array.dtype.str[1:]
        tensor = None
    elif path.suffix == ".safetensors":
        with _open_safetensors(path) as file:
            tensor = _choose(path, list(file.keys()), tensor)
            view = file.get_slice(tensor)
            shape, kind = tuple(view.get_shape()), view.get_dtype()
    else:
        raise ValueError(
            f"{path}: a shard must be a .npy or .safetensors file, got {path.suffix or 'no suffix'}"
        )
    if kind not in DTYPES:
        raise ValueError(f"{path}: must hold float32, bfloat16, float16 or float64, got {kind}")
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"{path}: must hold a matrix (N, D) of activations, got shape {tuple(shape)}")
    return Shard(path, tensor, *shape, DTYPES[kind])


def _choose(path: Path, names: list[str], tensor: str | None) -> str:
    listed = ", ".join(sorted(names)[:8]) + (", ..." if len(names) > 8 else "")
    if tensor is None and len(names) == 1:
        return names[0]
    if tensor is None:
        raise ValueError(f"{path}: holds {len(names)} tensors ({listed}); name the one to read with `tensor`")
    if tensor not in names:
        raise ValueError(
            f"{path}: tensor must be one of those that the file holds ({listed}), got {tensor!r}"
        )
    return tensor


def _open(shard: Shard):
    """Something that gives rows by slicing: a memory-mapped array or a lazy safetensors slice."""
    if shard.tensor is None:
        return _open_npy(shard.path)
    return _open_safetensors(shard.path).get_slice(shard.tensor)


def _open_npy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a whole .npy array of numbers: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path}: must be a .npy array, got an .npz archive")
    return array


def _open_safetensors(path: Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole .safetensors file: {error}") from error
