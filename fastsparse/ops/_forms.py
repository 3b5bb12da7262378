"""What an op takes and returns, in words that a program reads.

An entry is a tensor's name, its shape and, where it isn't that of the first tensor, its dtype; "< M" bounds
the numbers that it holds, "?" marks one that may be absent. Behind "->" stands what comes out, "if needs_x"
being when: otherwise its shape is (0,). A letter stands for one size wherever it occurs; a size may also be a
number, or an argument of the op. S, the number of sequences, is B where there are no cu_seqlens. Behind "|"
stands what holds where the first tensor has another number of dimensions.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastsparse._validation import check_range

_DTYPES = {"int64": torch.int64, "int32": torch.int32, "bool": torch.bool}
_ENTRY = re.compile(
    r"(?:(?P<name>\w+) )?\((?P<shape>[^)]+)\)(?: (?P<dtype>int64|int32|bool))?(?: < (?P<below>\w+))?\??"
    r"(?: if (?P<needed>\w+))?(?:, |$)"
)


class Entry(NamedTuple):
    """One tensor: its shape in letters, numbers and ``"S + 1"``, and its dtype where that is its own."""

    name: str | None
    shape: tuple[str, ...]
    dtype: torch.dtype | None
    below: str | None
    needed: str | None

    @staticmethod
    def all_of(text: str) -> list["Entry"]:
        found = [
            Entry(
                entry["name"],
                tuple(entry["shape"].split(", ")),
                _DTYPES.get(entry["dtype"]),
                entry["below"],
                entry["needed"],
            )
            for entry in _ENTRY.finditer(text)
        ]
        if "".join(match[0] for match in _ENTRY.finditer(text)) != text:
            raise ValueError(f"form: must be entries such as 'indices (N, k) int64 < M', got {text!r}")
        return found


class Form:
    """What an op takes and returns. The public functions check the same before, and say it better."""

    def __init__(self, text: str, arguments: Sequence[str]) -> None:
        self.text = text
        sides = [alternative.split(" -> ") for alternative in text.split(" | ")]
        self.taken = [Entry.all_of(taken) for taken, _ in sides]
        self._returned = [Entry.all_of(returned) for _, returned in sides]
        self.demands = " | ".join(re.sub(r" < \w+", "", taken) for taken, _ in sides)  # as csrc/ reads it
        self._place = {name: place for place, name in enumerate(arguments)}
        self._refusal = lru_cache(maxsize=1024)(self._judge)  # to look at every call would cost a launch
        self._bounds = [self._bound(entry) for entry in self.taken[0] if entry.below]

    def check(self, op: str, arguments: Sequence) -> None:
        """The tensors among an op's arguments, None where one is absent, are as the form says.

        Raises:
            ValueError: one of them isn't.
        """
        refusal = self._refusal(
            *(
                tensor if tensor is None else (tensor.shape, tensor.dtype, tensor.device)
                for tensor in arguments
                if tensor is None or isinstance(tensor, Tensor)
            )
        )
        if refusal is not None:
            raise ValueError(f"{op}: {refusal}")

    def check_indices(self, op: str, arguments: Sequence) -> None:
        """What indexes is in range, where a check may look at it (check_range).

        Raises:
            IndexError: it isn't.
        """
        for indices, bound in self.indices(arguments):
            check_range(op, indices, bound)

    def indices(self, arguments: Sequence) -> list[tuple[Tensor, int]]:
        """Every tensor that indexes, and what its numbers must be less than."""
        return [
            (arguments[place], arguments[of] if dim is None else arguments[of].shape[dim])
            for place, of, dim in self._bounds
        ]

    def empty(self, arguments: Sequence) -> Tensor | tuple[Tensor, ...]:
        """What the op returns, but for the numbers: its fake."""
        first = arguments[0]
        case = self._case(first.dim())
        sizes = {name: arguments[place] for name, place in self._place.items()}
        for entry in self.taken[case]:
            tensor = arguments[self._place[entry.name]]
            for symbol, size in zip(entry.shape, () if tensor is None else tensor.shape, strict=False):
                sizes |= {symbol[0]: size - 1} if symbol.endswith(" + 1") else {}
                sizes.setdefault(symbol, size)
        if "B" in sizes:
            sizes.setdefault("S", sizes["B"])
        out = [
            first.new_empty(
                [int(symbol) if symbol.isdecimal() else sizes[symbol] for symbol in entry.shape]
                if entry.needed is None or sizes[entry.needed]
                else [0],
                dtype=entry.dtype or first.dtype,
            )
            for entry in self._returned[case]
        ]
        return out[0] if len(out) == 1 else tuple(out)

    def _case(self, rank: int) -> int:
        return next((i for i, taken in enumerate(self.taken) if len(taken[0].shape) == rank), 0)

    def _bound(self, indices: Entry) -> tuple[int, int, int | None]:
        """Where the indices are, and where their bound is: an argument, or a dimension of one."""
        place = self._place[indices.name]
        if indices.below in self._place:
            return place, self._place[indices.below], None
        of = next(entry for entry in self.taken[0] if indices.below in entry.shape)
        return place, self._place[of.name], of.shape.index(indices.below)

    def _judge(self, *tensors: tuple[torch.Size, torch.dtype, torch.device] | None) -> str | None:
        rank, dtype, device = len(tensors[0][0]), *tensors[0][1:]
        taken = self.taken[self._case(rank)]
        given = [(entry, tensor) for entry, tensor in zip(taken, tensors, strict=True) if tensor is not None]
        packed = any(entry.name == "cu_seqlens" for entry, _ in given)
        sizes: dict[str, int] = {}
        for entry, (shape, its_dtype, its_device) in given:
            symbols = entry.shape if packed else [symbol.replace("S", "B") for symbol in entry.shape]
            if not _fits(shape, symbols, sizes):
                return (
                    f"{entry.name} must have shape ({', '.join(symbols)}) where {sizes}, got {tuple(shape)}"
                )
            if its_dtype != (entry.dtype or dtype):
                return f"{entry.name} must be {str(entry.dtype or dtype)[6:]}, got {str(its_dtype)[6:]}"
            if its_device != device:
                return f"{entry.name} must be on {device}, got {its_device}"
        return None


def _fits(shape: torch.Size, symbols: Sequence[str], sizes: dict[str, int]) -> bool:
    """Whether a shape is in a form, by what letters stand for; from now on, where they stood for nothing."""
    if len(shape) != len(symbols):
        return False
    for size, symbol in zip(shape, symbols, strict=True):
        if symbol.endswith(" + 1"):
            symbol, size = symbol[0], size - 1
        if size != (int(symbol) if symbol.isdecimal() else sizes.setdefault(symbol, size)):
            return False
    return True
