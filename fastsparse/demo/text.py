"""The text: Python's own language reference, which ships with every Python, cut into windows of tokens."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

# Underlines of headings and rules of tables: typography, not language.
_RULE = re.compile(r"^[\s*=\-~^\"+|#.]{3,}$", re.MULTILINE)
_ROW = re.compile(r"^\s*\|(.*)\|\s*$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n\s*\n")

Tokenize = Callable[[str], tuple[list[int], list[tuple[int, int]]]]


@dataclass(frozen=True)
class Window:
    """Consecutive tokens that the model reads together.

    Attributes:
        topic: which chapter of the reference they come from.
        text: the chapter.
        ids: the token ids, without special tokens.
        spans: start and end of every token in ``text``, in characters.
    """

    topic: str
    text: str
    ids: list[int]
    spans: list[tuple[int, int]]


def language_reference() -> dict[str, str]:
    """Chapters of the language reference by topic (about 465 kB)."""
    from pydoc_data.topics import topics

    return dict(topics)


def clean(topics: Mapping[str, str]) -> dict[str, str]:
    """Chapters in running text, each paragraph once.

    Chapters of the reference quote each other at length (a fifth of it is repetition), which would put
    the same paragraph into the training and the held-out split, and fill a feature's examples with copies.

    Args:
        topics: text by topic.

    Returns:
        Text by topic, in the order given, whitespace collapsed; topics left without text are absent.

    Example:
        >>> clean({"a": "Title\\n*****\\n\\nSome\\n  words.", "b": "Some words.\\n\\nMore."})
        {'a': 'Title Some words.', 'b': 'More.'}
    """
    seen: set[str] = set()
    chapters = {}
    for topic, text in topics.items():
        fresh = []
        prose = _ROW.sub(lambda row: row[1].replace("|", " "), _RULE.sub("", text))
        for paragraph in _BLANK_LINES.split(prose):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                fresh.append(words)
        if fresh:
            chapters[topic] = " ".join(fresh)
    return chapters


def windows(chapters: Mapping[str, str], tokenize: Tokenize, size: int) -> Iterator[Window]:
    """Cut every chapter into windows of nearly equal length, none longer than ``size``, none overlapping.

    Args:
        chapters: text by topic.
        tokenize: text to (token ids, character spans), one for each token.
        size: the most tokens in a window, at least 1.

    Yields:
        The :class:`Window` s, in order; every token is in exactly one.

    Example:
        >>> words = lambda text: ([1] * 5, [(i, i + 1) for i in range(0, 10, 2)])
        >>> [len(window.ids) for window in windows({"t": "a b c d e"}, words, size=4)]
        [2, 3]
    """
    if size < 1:
        raise ValueError(f"windows: size must be at least 1, got {size}")
    for topic, text in chapters.items():
        ids, spans = tokenize(text)
        parts = -(-len(ids) // size)
        for part in range(parts):
            cut = slice(part * len(ids) // parts, (part + 1) * len(ids) // parts)
            yield Window(topic, text, ids[cut], spans[cut])


def split(items: list[Window], held_out_every: int = 10) -> tuple[list[Window], list[Window]]:
    """Training and held-out windows: every tenth is held out, so that both cover all of the text."""
    train = [item for i, item in enumerate(items) if i % held_out_every != held_out_every - 1]
    return train, items[held_out_every - 1 :: held_out_every]
