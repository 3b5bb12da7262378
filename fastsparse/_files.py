"""Files that are written whole or not at all; and files that others may cut or replace while they are read.

Those are read by position, never mapped: touching a mapped page that its file has lost kills the process by
SIGBUS (mmap(2)), without a word, where a read comes back short. The library of .safetensors maps what it
reads, so headers are taken apart here: https://github.com/huggingface/safetensors#format
"""

import fcntl
import io
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64,
}  # fmt: skip
_LONGEST_HEADER = 100_000_000  # bytes; the library's own bound


class File(io.FileIO):
    """A file to be read by position, closed when nobody holds it any more.

    Raises:
        OSError: it can't be opened, or isn't a file.
    """

    def __init__(self, path: Path) -> None:
        # Without waiting for another side, which a named pipe may not have.
        super().__init__(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
        self.path = path
        self._status = os.fstat(self.fileno())
        if not stat.S_ISREG(self._status.st_mode):
            self.close()
            raise OSError(f"{path}: must be a file, got a pipe or a device")

    def __del__(self) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Bytes, when it was opened."""
        return self._status.st_size

    def changed(self) -> bool:
        """Whether it has been written to since it was opened."""
        now, then = os.fstat(self.fileno()), self._status
        return (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns)

    def fill(self, out: memoryview, offset: int) -> None:
        """Read as many bytes as ``out`` has, from a position on.

        Raises:
            OSError: the file ends before, or can't be read.
        """
        while out:
            try:
                count = os.preadv(self.fileno(), [out], offset)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            if count == 0:
                raise OSError(f"{self.path}: ends at byte {offset}, where {len(out)} more were to be read")
            out, offset = out[count:], offset + count


class Entry(NamedTuple):
    """A tensor in a .safetensors file: dtype as that format names it, position and size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def safetensors_header(file: File) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors and the metadata of a .safetensors file.

    Raises:
        OSError: the file can't be read.
        ValueError: the file isn't whole, or something else.
    """
    start = bytearray(min(8, file.size))
    file.fill(memoryview(start), 0)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(file.size - 8, _LONGEST_HEADER):
        raise ValueError(f"{file.path}: not a whole .safetensors file: its header is cut or none")
    text = bytearray(length)
    file.fill(memoryview(text), 8)
    try:
        header = json.loads(text.decode())
        metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
        entries = {name: _entry(told, 8 + length) for name, told in header.items()}
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(f"{file.path}: not a whole .safetensors file: its header is damaged") from error
    end = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.size)):
        if entry.offset != end:
            raise ValueError(f"{file.path}: not a whole .safetensors file: its tensors overlap or leave gaps")
        end += entry.size
    if end != file.size:
        raise ValueError(
            f"{file.path}: not a whole .safetensors file: must be {end} bytes by its header, got {file.size}"
        )
    return entries, metadata


def _entry(told: dict, begin: int) -> Entry:
    """One tensor of a header; the positions there count from the header's end."""
    first, last = told["data_offsets"]
    dtype, shape = told["dtype"], tuple(told["shape"])
    if not all(type(number) is int and number >= 0 for number in (first, last, *shape)):
        raise ValueError(f"not counts: {told}")
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != last - first:
        raise ValueError(f"not as many bytes as numbers: {told}")
    return Entry(dtype, shape, begin + first, last - first)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file that appears under its name when it is whole and on the disk, or not at all.

    A process that is killed meanwhile leaves ``.<name>.partial``, which the next one writes over.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have a file's or a folder's contents on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process out of a folder; the system releases the lock however this process ends.

    Raises:
        BlockingIOError: another one is using it.
    """
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"{folder}: another run is using this output folder") from error
        yield
    finally:
        os.close(descriptor)
