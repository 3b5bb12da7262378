"""The tensors of a file that others wrote: taken by name, each of the shape that its layout gives it."""

import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsparse._extras import lacking, missing
from fastsparse._files import DTYPES, File, safetensors_header
from fastsparse._validation import DTYPES as FLOATS


class Tensors:
    """What a file holds.

    Args:
        path: of the file, for messages.
        names: of its tensors.
        read: one of them.
    """

    def __init__(self, path: Path, names: Iterable[str], read: Callable[[str], Any]) -> None:
        self.path, self._names, self._read = path, list(names), read
        self._taken: list[str] = []
        self._sizes: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def expect(self, **sizes: int) -> None:
        """Sizes that a configuration says."""
        self._sizes.update(sizes)

    def take(self, name: str, *shape: str | int, dtypes: Iterable[torch.dtype] = FLOATS) -> Tensor:
        """A tensor whose sizes are these: M, D and so on are the same in all of a file.

        Raises:
            ValueError: there is none, or it has another shape or dtype.
        """
        if name not in self._names:
            raise ValueError(f"{self.path}: must hold a tensor {name}, it holds {', '.join(self._names)}")
        self._taken.append(name)
        tensor = self._read(name)
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            raise ValueError(f"{self.path}: {name} must be a dense tensor, got {type(tensor).__name__}")
        if tensor.dtype not in dtypes:
            wanted = ", ".join(str(dtype)[6:] for dtype in dtypes)
            raise ValueError(f"{self.path}: {name} must be {wanted}, got {str(tensor.dtype)[6:]}")
        sizes = dict(self._sizes)
        right = tensor.dim() == len(shape) and all(
            found > 0 and found == (want if isinstance(want, int) else sizes.setdefault(want, found))
            for want, found in zip(shape, tensor.shape, strict=True)
        )
        if not right:
            known = [want if isinstance(want, int) else self._sizes.get(want, want) for want in shape]
            form, wanted = (f"({', '.join(map(str, of))}{',' * (len(of) == 1)})" for of in (shape, known))
            form = wanted if form == wanted else f"{form} = {wanted}"
            raise ValueError(f"{self.path}: {name} must have shape {form}, got {tuple(tensor.shape)}")
        self._sizes = sizes
        return tensor.detach()

    def finish(self) -> None:
        """All that the layout has was taken.

        Raises:
            ValueError: there is more.
        """
        more = [name for name in self._names if name not in self._taken]
        if more:
            raise ValueError(
                f"{self.path}: must hold {', '.join(self._taken)} and no more, it holds {', '.join(more)} too"
            )


def from_safetensors(path: Path) -> Tensors:
    """The tensors of a .safetensors file, each read when it is taken.

    Raises:
        OSError: it can't be read.
        ValueError: it isn't whole.
    """
    file = File(path)
    entries, _ = safetensors_header(file)

    def read(name: str) -> Tensor:
        entry = entries[name]
        if entry.dtype not in DTYPES:
            raise ValueError(f"{path}: {name} must be {', '.join(DTYPES)}, got {entry.dtype}")
        if entry.size == 0:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        memory = bytearray(entry.size)
        file.fill(memoryview(memory), entry.offset)
        return torch.frombuffer(memory, dtype=DTYPES[entry.dtype]).view(entry.shape)

    return Tensors(path, entries, read)


def dictionary(path: Path) -> dict[str, Any]:
    """What torch.save wrote: tensors and plain values by name. No code of the file's is run.

    Raises:
        OSError: it can't be read.
        ValueError: it isn't whole, or is a pickle of something else.
    """
    with io.BufferedReader(File(path)) as file:  # reads all that it is asked for, however much
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of a dozen kinds, a seek before the beginning among them
            raise ValueError(
                f"{path}: must be a dictionary of tensors that torch.load(weights_only=True) reads; got "
                "a pickle of something else, or a file that is damaged or cut"
            ) from error
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path}: must be a dictionary of tensors, got {type(found).__name__}")
    return dict(found)


def from_dictionary(path: Path, found: Mapping[str, Any]) -> Tensors:
    """The tensors of a dictionary that was read from a file."""
    return Tensors(path, found, found.__getitem__)


def from_npz(path: Path) -> Tensors:
    """The arrays of an .npz file.

    Raises:
        ModuleNotFoundError: NumPy is not installed.
        OSError: it can't be read.
        ValueError: it isn't whole, or holds pickles.
    """
    if package := missing("numpy"):
        raise lacking("fastsparse.formats", package, "train")
    import numpy as np

    with io.BufferedReader(File(path)) as file:
        try:
            archive = np.load(file, allow_pickle=False)
            arrays = {name: archive[name] for name in archive.files}
        except Exception as error:  # of its own, zipfile's and zlib's
            raise ValueError(
                f"{path}: must be an .npz file of numbers; got pickles, or a file that is damaged or cut"
            ) from error

    def read(name: str) -> Tensor:
        array = arrays[name]
        try:
            return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C", copy=False))
        except TypeError as error:  # PyTorch has no such dtype
            raise ValueError(f"{path}: {name} must be floating, got {array.dtype}") from error

    return Tensors(path, arrays, read)
