"""Activations on disk: any number of ``.npy`` and ``.safetensors`` files, read by ranges of rows."""

import glob
import math
import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsparse._files import DTYPES, File, safetensors_header

SUFFIXES = (".npy", ".safetensors")
# What a file's numbers are read as. NumPy has no bfloat16: its bits are carried as int16.
_STORED = {
    torch.float64: np.dtype("<f8"), torch.float32: np.dtype("<f4"), torch.float16: np.dtype("<f2"),
    torch.bfloat16: np.dtype("<i2"),
}  # fmt: skip
_NPY = {"f8": torch.float64, "f4": torch.float32, "f2": torch.float16}  # in any byte order


class Shard(NamedTuple):
    """One file's activations.

    Attributes:
        tensor: the array's name inside a safetensors file.
        shape: of a row: (D,), or (L, D) where it holds several sources or layers of the same token.
        offset, stored, by_columns: where in the file the numbers begin, what they are, and whether a column's
            follow one another, as in Fortran, rather than a row's.
    """

    path: Path
    tensor: str | None
    rows: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    stored: np.dtype
    by_columns: bool

    @property
    def width(self) -> int:
        """How many numbers a row has."""
        return math.prod(self.shape)


class Shards:
    """All activations of a run, as one sequence of rows that is read a range at a time.

    Every file's header is checked here, before any training; a few files stay open.

    Args:
        sources: files, folders (their shards, by name; not hidden ones, nor those of folders within) and
            globs of files, in order. A file counts once, by whatever names it is reached.
        tensor: which tensor to read in safetensors files with several.
        ignore: which files are no shards, though they are found.
        setting: what named the sources, for errors.

    Attributes:
        shards: those that hold rows, in order.
        shape: of a row: (D,), or (L, D) of several sources or layers.
        rows, dtype: how many there are, and what holds all of them exactly.

    Raises:
        FileNotFoundError: a source is missing or holds no shard.
        OSError: a file can't be read.
        ValueError: a file is no shard, or shapes differ.
    """

    def __init__(
        self,
        sources: Iterable[str],
        tensor: str | None = None,
        *,
        ignore: Callable[[Path], bool] = lambda path: False,
        setting: str = "data",
    ) -> None:
        self._setting = setting
        self.shards = [_described(path, tensor) for path in _expand(sources, ignore, setting)]
        first = self.shards[0]
        for shard in self.shards:
            if shard.shape != first.shape:
                raise ValueError(
                    f"{shard.path}: every shard must have rows of the shape of those in the first, "
                    f"{first.path} ({first.shape}), got {shard.shape}"
                )
        self.shards = [shard for shard in self.shards if shard.rows]
        if not self.shards:
            raise ValueError(
                f"{setting}: the shards must hold at least one token, {first.path} and others hold none"
            )
        self.shape = first.shape
        self.rows = sum(shard.rows for shard in self.shards)
        self.dtype = first.dtype
        for shard in self.shards:
            self.dtype = torch.promote_types(self.dtype, shard.dtype)
        # A run may have more shards than the system lets it open.
        self._open = lru_cache(maxsize=32)(_open)

    def fingerprint(self) -> list[list]:
        """What must be the same in a resumed run: each shard's name, rows and dtype, in order."""
        return [[shard.path.name, shard.rows, str(shard.dtype)[6:]] for shard in self.shards]

    def read(self, shard: Shard, start: int, stop: int, out: Tensor, positions: np.ndarray) -> None:
        """Copy rows [start, stop) of one shard to ``out[positions]``.

        Raises:
            OSError: the file can't be read any more, or isn't what it was when training began.
        """
        try:
            if self._open(shard).changed():
                self._open.cache_clear()
            rows = _read(self._open(shard), shard, start, stop)
        except (OSError, ValueError) as error:
            raise OSError(f"{self._setting}: can't be read any more: {error}") from error
        # As integers: NumPy scatters rows in half of PyTorch's time, and has no bfloat16.
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[out.itemsize]
        out.view(bits).numpy()[positions] = rows.to(out.dtype).view(bits).numpy()


def _expand(sources: Iterable[str], ignore: Callable[[Path], bool], setting: str) -> list[Path]:
    """Files, each once."""
    found: dict[str, Path] = {}
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            # Hidden files are no shards, such as macOS's ._a.npy beside a.npy; globs skip them too.
            here = [
                item for item in path.iterdir() if item.suffix in SUFFIXES and not item.name.startswith(".")
            ]
            problem = f"{source}: the folder holds no .npy or .safetensors file"
        elif path.exists():
            here, problem = [path], ""
        else:
            here = [Path(item) for item in glob.glob(str(path), recursive=True)]
            problem = f"{source}: no such file or folder, and no file matches it as a glob"
        here = sorted(item for item in here if not item.is_dir())
        if not here:
            raise FileNotFoundError(problem)
        for item in here:
            if not ignore(item):
                found.setdefault(os.path.realpath(item), item)
    if not found:
        raise ValueError(f"{setting}: must name at least one file, folder or glob of shards, got none")
    return list(found.values())


def _described(path: Path, tensor: str | None) -> Shard:
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: a shard must be a .npy or .safetensors file, got {path.suffix or 'no suffix'}"
        )
    with File(path) as file:
        return _describe(file, tensor)


def _describe(file: File, tensor: str | None) -> Shard:
    """Read a file's header."""
    path, by_columns = file.path, False
    if path.suffix == ".npy":
        tensor = None
        shape, by_columns, stored = _npy_header(file)
        kind, offset, size = stored.name, file.tell(), file.size - file.tell()
        dtype = _NPY.get(stored.str[1:])
    else:
        entries, _ = safetensors_header(file)
        tensor = _choose(path, list(entries), tensor)
        kind, shape, offset, size = entries[tensor]
        dtype = DTYPES.get(kind)
        stored = _STORED.get(dtype)
    if dtype not in _STORED:
        raise ValueError(f"{path}: must hold float32, bfloat16, float16 or float64, got {kind}")
    if len(shape) not in (2, 3) or min(shape) < 0 or 0 in shape[1:]:
        raise ValueError(f"{path}: must hold activations (N, D) or (N, L, D), got shape {shape}")
    needed = math.prod(shape) * stored.itemsize
    if needed > size:
        raise ValueError(
            f"{path}: not a whole {path.suffix} file: its shape {shape} takes {needed} bytes, it holds {size}"
        )
    return Shard(path, tensor, shape[0], shape[1:], dtype, offset, stored, by_columns)


def _npy_header(file: File) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether by columns, and dtype; what follows in the file are the numbers."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        return readers[np.lib.format.read_magic(file)](file)
    except OSError:
        raise
    except (
        Exception
    ) as error:  # NumPy lets Python parse it, which fails in many ways: TokenError, RecursionError
        raise ValueError(f"{file.path}: not a whole .npy file: its header is cut, damaged or none") from error


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


def _open(shard: Shard) -> File:
    """A shard's file, which must be as it was described."""
    file = File(shard.path)
    now = _describe(file, shard.tensor)
    if now != shard:
        raise ValueError(
            f"{shard.path}: must hold {(shard.rows, *shard.shape)} {str(shard.dtype)[6:]} as before, "
            f"got {(now.rows, *now.shape)} {str(now.dtype)[6:]} or another layout"
        )
    return file


def _read(file: File, shard: Shard, start: int, stop: int) -> Tensor:
    """Rows [start, stop), in the shard's dtype."""
    itemsize = shard.stored.itemsize
    if shard.by_columns:
        columns = np.empty((shard.width, stop - start), shard.stored)
        begin = shard.offset + start * itemsize
        for number, column in enumerate(columns.view(np.uint8)):
            file.fill(column.data, begin + number * shard.rows * itemsize)
        rows = columns.reshape(*shard.shape[::-1], -1).T  # the first of a row's axes runs fastest
    else:
        rows = np.empty((stop - start, *shard.shape), shard.stored)
        file.fill(rows.reshape(-1).view(np.uint8).data, shard.offset + start * shard.width * itemsize)
    return torch.from_numpy(rows.astype(shard.stored.newbyteorder("="), copy=False)).view(shard.dtype)
