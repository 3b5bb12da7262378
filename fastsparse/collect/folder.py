"""A collection on disk: what is in which file.

``collection.json`` says what was asked for. Piece number n is ``<n>.npy`` (or ``.safetensors``), the rows of
its windows; ``held_out/<n>.npy``, those of the windows that are held out; and ``<n>.jsonl``, a line for every
window. The first of them is written last: a piece is whole when it is there.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fastsparse._files import replacing
from fastsparse.collect.config import DTYPES
from fastsparse.collect.texts import Window

RECIPE = "collection.json"
TENSOR = "activations"  # its name in a .safetensors file


class Folder:
    """The files of a collection.

    Args:
        path: the folder.
        dtype: of its shards; default: as its recipe says.

    Raises:
        FileNotFoundError: the folder is no collection.
    """

    def __init__(self, path: Path, dtype: str | None = None) -> None:
        self.path = path
        self._suffix = DTYPES[dtype or self.recipe()["settings"]["dtype"]]

    def begun(self) -> bool:
        """Whether something is there already that was made by a recipe."""
        return (self.path / "00000.jsonl").exists()

    def recipe(self) -> dict[str, Any]:
        """What was asked for, and what came of it where it is finished."""
        if not (self.path / RECIPE).exists():
            raise FileNotFoundError(
                f"{self.path}: must be a folder that `fastsparse collect` made, which holds {RECIPE}"
            )
        return json.loads((self.path / RECIPE).read_text(encoding="utf-8"))

    def say(self, recipe: dict[str, Any]) -> None:
        """Write the recipe."""
        with replacing(self.path / RECIPE) as file:
            file.write(json.dumps(recipe, indent=2).encode() + b"\n")

    def pieces(self) -> int:
        """How many pieces are whole."""
        number = 0
        while self._shard(number).exists():
            number += 1
        return number

    def windows(self, number: int) -> list[Window]:
        """The windows of a piece, in the order of the text."""
        with open(self.path / f"{number:05d}.jsonl", encoding="utf-8") as file:
            return [Window(**json.loads(line)) for line in file]

    def rows(self, number: int, *, held_out: bool = False) -> Tensor:
        """The rows (N, D), or (N, L, D), of a piece's windows, of one kind, in the order of the text."""
        path = self._shard(number, held_out)
        if not path.exists():
            return torch.empty(0, 0)
        return torch.from_numpy(np.load(path)) if path.suffix == ".npy" else load_file(path)[TENSOR]

    def write(self, number: int, windows: list[Window], rows: list[Tensor]) -> None:
        """Write a piece, of which each window has its rows."""
        with replacing(self.path / f"{number:05d}.jsonl") as file:
            file.writelines(json.dumps(window._asdict()).encode() + b"\n" for window in windows)
        for held_out in (True, False):
            own = [row for row, window in zip(rows, windows, strict=True) if window.held_out is held_out]
            if own or not held_out:
                self._write(self._shard(number, held_out), torch.cat(own or [rows[0][:0]]))

    def _write(self, path: Path, rows: Tensor) -> None:
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as file:
            if path.suffix == ".npy":
                np.save(file, rows.numpy())
            else:
                file.write(save({TENSOR: rows}))

    def _shard(self, number: int, held_out: bool = False) -> Path:
        folder = self.path / "held_out" if held_out else self.path
        return folder / f"{number:05d}{self._suffix}"
