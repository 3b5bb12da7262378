"""Documents from files, and the windows of tokens that a model reads of them."""

import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

SUFFIXES = (".txt", ".jsonl", ".parquet")

Tokenize = Callable[[str], tuple[list[int], list[tuple[int, int]]]]


class Document(NamedTuple):
    """A text, and where it is from; that of a ``.txt`` file is told by line."""

    label: str
    text: str
    by_line: bool = False


class Window(NamedTuple):
    """Consecutive tokens that the model reads together.

    Attributes:
        number: of all windows, from 0.
        document, part: the number of their document, and theirs in it, from 0.
        end: how many tokens there are up to here, theirs included.
        held_out: whether nothing is to be trained on them.
        label: where they are from.
        text: their stretch of the document.
        ids: the token ids, without special tokens.
        spans: start and end of every token in ``text``, in characters.
    """

    number: int
    document: int
    part: int
    end: int
    held_out: bool
    label: str
    text: str
    ids: list[int]
    spans: list[tuple[int, int]]


def files(sources: Iterable[str]) -> list[Path]:
    """Files of text, each once, in order.

    Raises:
        FileNotFoundError: a source is missing or holds no text.
        ValueError: a file's suffix is unknown, or there is no source.
    """
    found: dict[str, Path] = {}
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            here = sorted(item for item in path.iterdir() if item.suffix in SUFFIXES and item.name[0] != ".")
        else:
            here = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not here:
            raise FileNotFoundError(
                f"texts: {source}: must be a {', '.join(SUFFIXES)} file, a folder or a glob of them"
            )
        for item in here:
            if item.suffix not in SUFFIXES:
                raise ValueError(
                    f"texts: {item}: must be a {', '.join(SUFFIXES)} file, got {item.suffix or 'no suffix'}"
                )
            found.setdefault(os.path.realpath(item), item)
    if not found:
        raise ValueError("texts: must name at least one file, folder or glob, got none")
    return list(found.values())


def documents(paths: Iterable[Path], field: str, label: str | None) -> Iterator[Document]:
    """All documents of files: a ``.txt`` file is one, a ``.jsonl`` line, a ``.parquet`` row.

    Args:
        paths: the files.
        field: what holds the text, of a line or row.
        label: what says where it is from; None for file and number.

    Raises:
        ModuleNotFoundError: a ``.parquet`` file is to be read, and pyarrow is not there.
        ValueError: a line is no JSON, or it or a row has no such field, or one that isn't text.
    """
    readers = {".jsonl": _json_lines, ".parquet": _parquet_rows}
    for path in paths:
        if path.suffix == ".txt":
            yield Document(path.name, path.read_text(encoding="utf-8"), by_line=True)
            continue
        for number, row in enumerate(readers[path.suffix](path, [field, *([label] if label else [])]), 1):
            where = f"{path.name}:{number}"
            for name in (field, label):
                if name is not None and not isinstance(row.get(name), str):
                    raise ValueError(
                        f"texts: {path}: {where} must hold text in {name!r}, got {row.get(name)!r:.80}"
                    )
            yield Document(row[label] if label else where, row[field])


def _json_lines(path: Path, fields: list[str]) -> Iterator[dict]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"texts: {path}: line {number} must be JSON, got {line[:80]!r}") from error
            if not isinstance(row, dict):
                raise ValueError(f"texts: {path}: line {number} must be an object, got {line[:80]!r}")
            yield row


def _parquet_rows(path: Path, fields: list[str]) -> Iterator[dict]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"texts: {path}: reading .parquet needs pyarrow, which is not installed: "
            "pip install 'fastsparse-torch[parquet]'",
            name="pyarrow",
        ) from error
    try:
        with ParquetFile(path) as file:
            columns = [name for name in fields if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                yield from batch.to_pylist()
    except ArrowException as error:
        raise ValueError(f"texts: {path}: not a whole .parquet file: {error}") from error


def windows(
    texts: Iterable[Document],
    tokenize: Tokenize,
    size: int,
    *,
    held_out_every: int = 0,
    after: Window | None = None,
) -> Iterator[Window]:
    """Cut every document into windows of nearly equal length, none longer than ``size``, none overlapping.

    Args:
        texts: the documents.
        tokenize: text to (token ids, character spans), one for each token.
        size: the most tokens in a window, at least 1.
        held_out_every: every so many windows one is held out, so that both kinds cover all of the text.
        after: begin after this window; documents before its own aren't even tokenized.

    Yields:
        The :class:`Window` s, in order; every token is in exactly one.

    Example:
        >>> words = lambda text: ([1] * 5, [(i, i + 1) for i in range(0, 10, 2)])
        >>> [window.text for window in windows([Document("t", "a b c d e")], words, size=4)]
        ['a b', 'c d e']
    """
    number, end = (0, 0) if after is None else (after.number + 1, after.end)
    begun = (0, 0) if after is None else (after.document, after.part + 1)
    for place, document in enumerate(texts):
        if place < begun[0]:
            continue
        ids, spans = tokenize(document.text)
        parts = -(-len(ids) // size)
        for part in range(begun[1] if place == begun[0] else 0, parts):
            cut = slice(part * len(ids) // parts, (part + 1) * len(ids) // parts)
            first, last = spans[cut][0][0], spans[cut][-1][1]
            line = f":{document.text.count(chr(10), 0, first) + 1}" if document.by_line else ""
            own = [(start - first, stop - first) for start, stop in spans[cut]]
            end += len(own)
            held_out = held_out_every > 0 and number % held_out_every == held_out_every - 1
            text = document.text[first:last]
            yield Window(number, place, part, end, held_out, document.label + line, text, ids[cut], own)
            number += 1
