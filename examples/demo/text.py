"""The text: Python's own language reference, which ships with every Python."""

import re
from collections.abc import Mapping

# Underlines of headings and rules of tables: typography, not language.
_RULE = re.compile(r"^[\s*=\-~^\"+|#.]{3,}$", re.MULTILINE)
_ROW = re.compile(r"^\s*\|(.*)\|\s*$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n\s*\n")


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
