"""Documents and windows: what is read of which file, and that every token is in one window."""

import json
import sys

import pytest

from fastsparse.collect.texts import Document, documents, files, windows

TEXT = "abcdefghijklmnopqrstuvwxyz"


def characters(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    return [ord(c) for c in text], [(i, i + 1) for i in range(len(text))]


@pytest.mark.parametrize("size", [1, 4, 26, 100])
def test_windows_hold_every_token_once_and_are_even(size):
    texts = [Document("alphabet", TEXT), Document("empty", ""), Document("one", "x")]
    cut = list(windows(texts, characters, size, held_out_every=3))
    assert "".join(chr(i) for window in cut for i in window.ids) == f"{TEXT}x"
    lengths = [len(window.ids) for window in cut if window.label == "alphabet"]
    assert max(lengths) <= size
    assert max(lengths) - min(lengths) <= 1
    assert (cut[-1].document, cut[-1].part, cut[-1].end) == (2, 0, 27)
    for number, window in enumerate(cut):
        assert (window.number, window.held_out) == (number, number % 3 == 2)
        assert [window.text[start:end] for start, end in window.spans] == [chr(i) for i in window.ids]
    for last in cut:  # from any on, the others come as before, and documents before it are left alone
        seen = []
        tokenize = lambda text, seen=seen: seen.append(text) or characters(text)  # noqa: E731
        assert list(windows(texts, tokenize, size, held_out_every=3, after=last)) == cut[last.number + 1 :]
        assert len(seen) == 3 - last.document


def test_windows_of_a_text_file_say_their_line():
    cut = windows([Document("a.txt", "ab\ncd\nef", by_line=True)], characters, 3)
    assert [window.label for window in cut] == ["a.txt:1", "a.txt:1", "a.txt:2"]


def test_documents_of_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "größe", "n": 1}\n{"text": "four"}\n', encoding="utf-8")
    (tmp_path / "._b.jsonl").write_bytes(b"\0")
    (tmp_path / "notes.md").write_text("no text")
    here = [str(tmp_path), str(tmp_path / "*.txt"), str(tmp_path / "b.jsonl")]
    assert [path.name for path in files(here)] == ["a.txt", "b.jsonl"]
    read = list(documents(files(here), "text", None))
    assert read == [("a.txt", "one\ntwo", True), ("b.jsonl:1", "größe", False), ("b.jsonl:2", "four", False)]


def test_rows_of_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    rows = {"body": ["one", "two"], "topic": ["x", "y"], "weight": [1.0, 2.0]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    paths = files([str(tmp_path)])
    assert list(documents(paths, "body", "topic")) == [("x", "one", False), ("y", "two", False)]
    with pytest.raises(ValueError, match=r"a.parquet:1 must hold text in 'text', got None"):
        list(documents(paths, "text", None))
    with pytest.raises(ValueError, match=r"a.parquet:1 must hold text in 'weight', got 1.0"):
        list(documents(paths, "body", "weight"))
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a.parquet: not a whole .parquet file"):
        list(documents(paths, "body", None))


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(ModuleNotFoundError, match=r"a.parquet: .*pip install 'fastsparse-torch\[parquet\]'"):
        list(documents(files([str(tmp_path)]), "text", None))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 must be JSON, got '{'"),
        ("[" * 50000, "line 1 must be JSON"),
        ("[1]", r"line 1 must be an object, got '\[1\]'"),
        (json.dumps({"texts": "x"}), "b.jsonl:1 must hold text in 'text', got None"),
        (json.dumps({"text": 5}), "b.jsonl:1 must hold text in 'text', got 5"),
    ],
)
def test_bad_lines(tmp_path, line, message):
    (tmp_path / "b.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        list(documents(files([str(tmp_path)]), "text", None))


def test_missing_and_unknown_files(tmp_path):
    for source in (tmp_path, tmp_path / "a.txt", tmp_path / "*.txt"):
        with pytest.raises(
            FileNotFoundError, match=r"must be a .txt, .jsonl, .parquet file, a folder or a glob"
        ):
            files([str(source)])
    (tmp_path / "a.pdf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a.pdf: must be a .txt, .jsonl, .parquet file, got .pdf"):
        files([str(tmp_path / "a.pdf")])
    with pytest.raises(ValueError, match="texts: must name at least one"):
        files([])
