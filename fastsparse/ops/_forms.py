"""What an op takes and returns, in words that a program reads.

An entry is a tensor's name, its shape and, where it isn't that of the first tensor, its dtype, "wide" for the
type that sums are carried in; "< M" bounds the numbers that it holds, "?" marks one that may be absent.
Behind "->" stands what comes out, "if needs_x" being when: otherwise its shape is (0,). A letter stands for
one size wherever it occurs; a size may also be a number, an argument of the op, or a product, as "groups k".
S, the number of sequences, is B where there are no cu_seqlens. E, the number of entries of a code that comes
out, is max_entries, and without one known only when they are there. Behind "|" stands what holds where the
first tensor has another number of dimensions, or where there is a tensor that the form before doesn't name.
"""

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastsparse._validation import check_offsets, check_range

_DTYPES = {"int64": torch.int64, "int32": torch.int32, "bool": torch.bool, "wide": "wide"}
_ENTRY = re.compile(
    r"(?:(?P<name>\w+) )?\((?P<shape>[^)]*)\)(?: (?P<dtype>int64|int32|bool|wide))?(?: < (?P<below>\w+))?"
    r"(?P<optional>\?)?(?: if (?P<needed>\w+))?(?:, |$)"
)


class Entry(NamedTuple):
    """One tensor: its shape in letters, numbers and ``"S + 1"``, and its dtype where that is its own."""

    name: str | None
    shape: tuple[str, ...]
    dtype: torch.dtype | str | None
    below: str | None
    optional: bool
    needed: str | None

    @staticmethod
    def all_of(text: str) -> list["Entry"]:
        found = [
            Entry(
                entry["name"],
                tuple(filter(None, entry["shape"].split(", "))),
                _DTYPES.get(entry["dtype"]),
                entry["below"],
                bool(entry["optional"]),
                entry["needed"],
            )
            for entry in _ENTRY.finditer(text)
        ]
        if "".join(match[0] for match in _ENTRY.finditer(text)) != text:
            raise ValueError(f"form: must be entries such as 'indices (N, k) int64 < M', got {text!r}")
        return found

    def dtype_beside(self, first: torch.dtype) -> torch.dtype:
        """The dtype that it has where the first tensor's is given."""
        if self.dtype == "wide":
            return torch.promote_types(first, torch.float32)
        return self.dtype or first


class Form:
    """What an op takes and returns. The public functions check the same before, and say it better."""

    def __init__(self, text: str, arguments: Sequence[str]) -> None:
        self.text = text
        sides = [alternative.split(" -> ") for alternative in text.split(" | ")]
        self.taken = [Entry.all_of(taken) for taken, _ in sides]
        self._returned = [Entry.all_of(returned) for _, returned in sides]
        self.demands = " | ".join(re.sub(r" < \w+", "", taken) for taken, _ in sides)  # as csrc/ reads it
        self._place = {name: place for place, name in enumerate(arguments)}
        self._tensors = [self._place[entry.name] for entry in max(self.taken, key=len)]
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
                for tensor in (arguments[place] for place in self._tensors)
            )
        )
        if refusal is not None:
            raise ValueError(f"{op}: {refusal}")

    def check_indices(self, op: str, arguments: Sequence) -> None:
        """What indexes is in range, and offsets bound rows, where a check may look at them (check_range).

        Raises:
            IndexError: an index isn't.
            ValueError: offsets don't.
        """
        for indices, bound in self.indices(arguments):
            check_range(op, indices, bound)
        if (place := self._place.get("offsets")) is not None and arguments[place] is not None:
            check_offsets(op, arguments[place], arguments[self._place["indices"]])

    def indices(self, arguments: Sequence) -> list[tuple[Tensor, int]]:
        """Every tensor that indexes, and what its numbers must be less than."""
        return [
            (arguments[place], arguments[of] if dim is None else arguments[of].shape[dim])
            for place, of, dim in self._bounds
        ]

    def empty(self, arguments: Sequence) -> Tensor | tuple[Tensor, ...]:
        """What the op returns, but for the numbers: its fake."""
        first = arguments[0]
        case = self._case([arguments[place] for place in self._tensors], first.dim())
        sizes = {name: arguments[place] for name, place in self._place.items()}
        for entry in self.taken[case]:
            tensor = arguments[self._place[entry.name]]
            for symbol, size in zip(entry.shape, () if tensor is None else tensor.shape, strict=False):
                sizes |= {symbol[0]: size - 1} if symbol.endswith(" + 1") else {}
                sizes.setdefault(symbol, size)
        if "B" in sizes:
            sizes.setdefault("S", sizes["B"])
        if self.is_uncounted(arguments):
            sizes["E"] = torch.library.get_ctx().new_dynamic_size()
        elif "max_entries" in sizes:
            sizes["E"] = sizes["max_entries"]
        out = [
            first.new_empty(
                [_size(symbol, sizes) for symbol in entry.shape]
                if entry.needed is None or sizes[entry.needed]
                else [0],
                dtype=entry.dtype_beside(first.dtype),
            )
            for entry in self._returned[case]
        ]
        return out[0] if len(out) == 1 else tuple(out)

    def is_uncounted(self, arguments: Sequence) -> bool:
        """Whether how much comes out depends on what the tensors hold."""
        place = self._place.get("max_entries")
        return place is not None and arguments[place] is None

    def _case(self, tensors: Sequence, rank: int) -> int:
        """The alternative that holds: one that names all tensors there are, and has the first's rank."""
        count = max(place for place, tensor in enumerate(tensors, 1) if tensor is not None)
        naming = [i for i, taken in enumerate(self.taken) if len(taken) >= count]
        return next((i for i in naming if len(self.taken[i][0].shape) == rank), naming[0])

    def _bound(self, indices: Entry) -> tuple[int, int, int | None]:
        """Where the indices are, and where their bound is: an argument, or a dimension of one."""
        place = self._place[indices.name]
        if indices.below in self._place:
            return place, self._place[indices.below], None
        of = next(entry for entry in self.taken[0] if indices.below in entry.shape)
        return place, self._place[of.name], of.shape.index(indices.below)

    def _judge(self, *tensors: tuple[torch.Size, torch.dtype, torch.device] | None) -> str | None:
        rank, dtype, device = len(tensors[0][0]), *tensors[0][1:]
        taken = self.taken[self._case(tensors, rank)]
        given = []
        for entry, tensor in zip(taken, tensors, strict=False):
            if tensor is not None:
                given.append((entry, tensor))
            elif not entry.optional:
                return f"{entry.name} must be given where {taken[0].name} has shape {tuple(tensors[0][0])}"
        packed = any(entry.name == "cu_seqlens" for entry, _ in given)
        sizes: dict[str, int] = {}
        for entry, (shape, its_dtype, its_device) in given:
            symbols = entry.shape if packed else [symbol.replace("S", "B") for symbol in entry.shape]
            if not _fits(shape, symbols, sizes):
                return (
                    f"{entry.name} must have shape ({', '.join(symbols)}) where {sizes}, got {tuple(shape)}"
                )
            if its_dtype != (wanted := entry.dtype_beside(dtype)):
                return f"{entry.name} must be {str(wanted)[6:]}, got {str(its_dtype)[6:]}"
            if its_device != device:
                return f"{entry.name} must be on {device}, got {its_device}"
        return None


def _size(symbol: str, sizes: dict) -> int:
    """What a symbol of what comes out stands for: a number, "N", "N + 1", "groups k" for a product."""
    if symbol.endswith(" + 1"):
        return sizes[symbol[0]] + 1
    return math.prod(int(part) if part.isdecimal() else sizes[part] for part in symbol.split(" "))


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
