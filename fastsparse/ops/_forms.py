"""The tensors that an op takes, in words that a program reads; csrc/forms.h has the same of every op.

An entry is a tensor's name, its shape and, where it isn't that of the first tensor, its dtype; "?" marks one
that may be absent. A letter stands for one size wherever it occurs. S, the number of sequences, is B where
there are no cu_seqlens. Behind "|" stands what holds where the first tensor has another number of dimensions.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_DTYPES = {"int64": torch.int64, "bool": torch.bool}
_ENTRY = re.compile(r"(?P<name>\w+) \((?P<shape>[^)]+)\) ?(?P<dtype>\w*)\??(?:, |$)")


class Entry(NamedTuple):
    """One tensor: its shape in letters, numbers and ``"S + 1"``, and its dtype where that is its own."""

    name: str
    shape: tuple[str, ...]
    dtype: torch.dtype | None


class Form:
    """What an op demands of its tensors. The public functions have checked it, and said it better."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._alternatives = [
            [
                Entry(entry["name"], tuple(entry["shape"].split(", ")), _DTYPES.get(entry["dtype"]))
                for entry in _ENTRY.finditer(alternative)
            ]
            for alternative in text.split(" | ")
        ]
        self._refusal = lru_cache(maxsize=1024)(self._judge)  # to look at every call would cost a launch

    def check(self, op: str, arguments: tuple) -> None:
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

    def _judge(self, *tensors: tuple[torch.Size, torch.dtype, torch.device] | None) -> str | None:
        rank, dtype, device = len(tensors[0][0]), *tensors[0][1:]
        entries = next(
            (form for form in self._alternatives if len(form[0].shape) == rank), self._alternatives[0]
        )
        given = [
            (entry, tensor) for entry, tensor in zip(entries, tensors, strict=True) if tensor is not None
        ]
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


FORMS: dict[str, Form] = {}  # of every op, by its name
