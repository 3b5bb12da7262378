import doctest
import getpass
import importlib
import json
import platform
import subprocess
from pathlib import Path

import pytest

from benchmarks import provenance, results


def test_written_results_come_back_a_line_a_case(tmp_path):
    path, cases = tmp_path / "machine" / "bench.json", [{"name": "ä", "figures": [1.5, 2]}, {"name": "b"}]
    results.write(path, {"bench": "a", "cases": cases, "bars": []})
    assert results.read(path) == {"format": results.FORMAT, "bench": "a", "cases": cases, "bars": []}
    assert len(path.read_text().splitlines()) == 4 + 2 + len(cases) + 1
    assert [file.name for file in path.parent.iterdir()] == ["bench.json"]


@pytest.mark.parametrize(
    ("figure", "error", "message"),
    [(float("nan"), ValueError, "JSON"), (float("inf"), ValueError, "JSON"), (2, OSError, "No space")],
)
def test_what_is_no_figure_or_a_crash_leaves_the_old_file(tmp_path, monkeypatch, figure, error, message):
    path = tmp_path / "bench.json"
    results.write(path, {"figure": 1})
    before = path.read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.os, "fsync", full)
    with pytest.raises(error, match=message):
        results.write(path, {"figure": figure})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 1', "must be JSON"),
        ('{"format": 99}', "got 99"),
        ("{}", "got None"),
        ("[1]", "got 'list'"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, text, message):
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        results.read(path)


def test_a_bench_is_found_by_its_file_and_comes_after_those_with_a_place(tmp_path):
    for name in ("a_new_op", "gated_recurrence", "topk_encode"):
        (tmp_path / f"bench_{name}.py").touch()
    expected = ["topk_encode", "gru_recurrence", "lstm_recurrence", "a_new_op"]
    assert list(results.benches(tmp_path)) == expected
    assert results.benches(tmp_path)["a_new_op"] == "bench_a_new_op"


def test_paths_are_cut_from_messages():
    failure = "OSError: /home/someone/lib/_ops_cpu.so: cannot open '/tmp/a/b' (1/2 of and/or N/A)"
    assert results.tidy(failure) == "OSError: <path>: cannot open '<path>' (1/2 of and/or N/A)"


def test_provenance_says_what_a_figure_depends_on_and_nothing_private():
    origin = provenance.provenance()
    named = "machine cpu cores threads instruction_set backend commit date torch"
    assert set(named.split()) <= origin.keys()
    text = json.dumps(results.tidy(origin))
    assert "<path>" not in text
    for private in (str(Path.home()), str(provenance.ROOT), platform.node(), f"/{getpass.getuser()}/"):
        assert private not in text
    assert origin["machine"].startswith("cpu-")
    assert origin["machine"].endswith(f"{origin['cores']}core")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one committed file in every place that counts or doesn't."""
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    for name in ("fastsparse/a.py", "docs/benchmarks.md", "benchmarks/results/a.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("committed")
    author = "-c", "user.name=a", "-c", "user.email=a@b.c"
    for arguments in (["init"], ["add", "."], [*author, "commit", "--message", "a"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)
    assert provenance.provenance()["modified"] is False
    return tmp_path


@pytest.mark.parametrize(
    ("name", "modified"),
    [
        ("fastsparse/a.py", True), ("fastsparse/new.py", True), ("csrc/cpu/new.cpp", True),
        ("docs/benchmarks.md", False), ("benchmarks/results/a.json", False), ("notes.txt", False),
    ],
)  # fmt: skip
def test_what_is_not_as_committed_is_said_of_what_figures_come_from(checkout, name, modified):
    (checkout / name).parent.mkdir(parents=True, exist_ok=True)
    (checkout / name).write_text("changed")
    assert provenance.provenance()["modified"] is modified


def test_a_repository_around_the_sources_is_not_theirs(checkout, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", checkout / "fastsparse")
    origin = provenance.provenance()
    assert origin["commit"] is origin["modified"] is None


@pytest.mark.parametrize("name", ["harness", "results", "provenance", "cases", "shapes", "report"])
def test_examples_in_the_docs_run(name):
    outcome = doctest.testmod(importlib.import_module(f"benchmarks.{name}"))
    assert outcome.attempted > 0
    assert outcome.failed == 0
