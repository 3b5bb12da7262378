"""What all models of sparse codes share: they say what they are made with, and can be saved and loaded."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastsparse._validation import check_count


class Model(nn.Module, ABC):
    """A module that can be made again from what :meth:`options` says."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        format: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        k: int | None = None,
        normalized: bool = False,
    ) -> "Model":
        """Load a model from disk: :func:`fastsparse.formats.load`, which explains the arguments.

        Raises:
            ValueError: it is one of another class; or as that says.
        """
        from fastsparse.formats import load  # which stands above

        found = load(path, format=format, dtype=dtype, device=device, k=k, normalized=normalized)
        if not isinstance(found, cls):
            raise ValueError(
                f"{cls.__name__}.from_pretrained: {path} must hold a {cls.__name__}, it holds a "
                f"{type(found).__name__}"
            )
        return found

    def save_pretrained(self, path: str | Path, format: str = "fastsparse") -> None:
        """Save to a folder: :func:`fastsparse.formats.save`, which explains the arguments."""
        from fastsparse.formats import save  # which stands above

        save(self, path, format=format)

    def options(self) -> dict[str, Any]:
        """What a model like this one is made with: all but its device, dtype and generator."""
        others = {"device", "dtype", "generator"}
        return {name: getattr(self, name) for name in signature(type(self)).parameters if name not in others}

    @classmethod
    @abstractmethod
    def sizes_of(cls, inputs: tuple[int, ...], targets: tuple[int, ...] | None) -> dict[str, int]:
        """The sizes, by name, of a model for tokens of such shapes, which its data say.

        Args:
            inputs: the shape of one token, such as (D,).
            targets: that of what is to be made of it; None where there is nothing but the tokens.

        Raises:
            ValueError: a model like this one can't be trained on them.
        """

    @property
    def _name(self) -> str:
        """By which errors call it."""
        return type(self).__name__

    def _ascending(self, name: str, numbers: Sequence[int], most: int) -> tuple[int, ...]:
        """Positive whole numbers, each larger than the one before it."""
        found = tuple(check_count(self._name, name, number, 1) for number in numbers)
        if any(a >= b for a, b in pairwise(found)) or (found and found[-1] > most):
            raise ValueError(f"{self._name}: {name} must ascend and be at most {most}, got {found}")
        return found

    def _weights(self, name: str, weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
        """So many weights, 1 each where none are given."""
        found = (1.0,) * count if weights is None else tuple(self._weight(name, w) for w in weights)
        if len(found) != count:
            raise ValueError(f"{self._name}: {name} must be {count} numbers, got {len(found)}")
        return found

    def _weight(self, name: str, weight: float) -> float:
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"{self._name}: {name} must be finite and at least 0, got {weight}")
        return float(weight)
