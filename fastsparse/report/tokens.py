"""Where the rows of the activations came from: windows of text, and the tokens in them."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Tokens:
    """Where every token came from: row n of the activations is token n of the windows, in order.

    Attributes:
        topics: topic of each window.
        texts: text of each window.
        spans: for each window an (n, 2) int array, start and end of its tokens in its text.
        held_out: of each window, whether the SAE never trains on it.
    """

    topics: list[str]
    texts: list[str]
    spans: list[np.ndarray]
    held_out: list[bool]

    @cached_property
    def window_of(self) -> np.ndarray:
        """(N,) the window of every token."""
        return np.repeat(np.arange(len(self.spans)), [len(spans) for spans in self.spans])

    @cached_property
    def place_of(self) -> np.ndarray:
        """(N,) the place of every token in its window."""
        return np.concatenate([np.arange(len(spans)) for spans in self.spans])

    @cached_property
    def piece_of(self) -> np.ndarray:
        """(N,) a number for every token: tokens that read the same, letter case aside, share it."""
        pieces = [
            text[start:end].lower()
            for text, spans in zip(self.texts, self.spans, strict=True)
            for start, end in spans.tolist()
        ]
        return np.unique(pieces, return_inverse=True)[1]

    @cached_property
    def words(self) -> list[str]:
        """For every token the whole word that it is a piece of, in lower case."""
        return [
            _word(text, start, end).lower()
            for text, spans in zip(self.texts, self.spans, strict=True)
            for start, end in spans.tolist()
        ]


def _word(text: str, start: int, end: int) -> str:
    """A stretch of text, grown to the word (letters, digits, underscores) around it."""
    if _in_word(text[start]):
        while start > 0 and _in_word(text[start - 1]):
            start -= 1
        while end < len(text) and _in_word(text[end]):
            end += 1
    return text[start:end]


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"
