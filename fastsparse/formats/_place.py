"""What was named to be loaded, a file or a folder, and what lies there."""

from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import torch

_FEW = 12  # names in a message


class Asked(NamedTuple):
    """What the caller said beside the path.

    Attributes:
        dtype: of the parameters; None for the file's.
        k: how many latents, for layouts that don't say it.
        normalized: whether the caller normalises activations as the file says they must be.
    """

    dtype: torch.dtype | None
    k: int | None
    normalized: bool


class Place(NamedTuple):
    """A folder, and the file in it that was named, if one was."""

    folder: Path
    file: Path | None

    @classmethod
    def of(cls, path: Path) -> "Place":
        """What a path names; a configuration stands for its folder.

        Raises:
            FileNotFoundError: there is nothing.
        """
        if path.is_dir():
            return cls(path, None)
        if not path.exists():
            raise FileNotFoundError(f"{path}: there is no such file or folder; nothing is downloaded")
        return cls(path.parent, None if path.suffix == ".json" else path)

    def holds(self, *patterns: str) -> bool:
        """Whether the named file, or one of the folder, is called like one of these."""
        return bool(self._found(patterns))

    def one(self, *patterns: str) -> Path:
        """The named file, whatever it is called; else the one of the folder that is called like this.

        Raises:
            FileNotFoundError: there is none.
            ValueError: there are several.
        """
        if self.file is not None:
            return self.file
        found = self._found(patterns)
        if not found:
            wanted = " or ".join(patterns)
            raise FileNotFoundError(f"{self.folder}: must hold {wanted}, it holds {self.listing()}")
        if len(found) > 1:
            names = ", ".join(path.name for path in found[:_FEW])
            raise ValueError(f"{self.folder}: holds {len(found)} autoencoders, name one file: {names}")
        return found[0]

    def listing(self) -> str:
        """The folder's contents, in words."""
        names = sorted(path.name + "/" * path.is_dir() for path in self.folder.iterdir())
        shown = ", ".join(names[:_FEW]) or "nothing"
        return shown + (f" and {len(names) - _FEW} more" if len(names) > _FEW else "")

    def _found(self, patterns: tuple[str, ...]) -> list[Path]:
        if self.file is not None:
            return [self.file] if any(fnmatch(self.file.name, pattern) for pattern in patterns) else []
        found = {path for pattern in patterns for path in self.folder.glob(pattern)}
        return sorted(path for path in found if path.is_file() and not path.name.startswith("."))
