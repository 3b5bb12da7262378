"""`make peers-test` tells what differs, and what proves nothing: its tests are those of a made-up library."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def run(monkeypatch, tmp_path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("peers_run", HERE / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "BUILD", tmp_path)
    monkeypatch.setattr(module, "_adapters", lambda: ["overcomplete"])
    monkeypatch.setattr(module, "_fetch_tests", lambda *_: "its release")
    (tmp_path / "overcomplete").mkdir()
    return module


def seen(outcomes: str, *, seconds: float = 1.0, served: int = 3, applied: bool = True) -> dict:
    tests = {
        f"t{number}": {"outcome": outcome, "seconds": seconds}
        for number, outcome in enumerate(outcomes.split())
    }
    return {
        "tests": tests,
        "served": {"there": served} if served else {},
        "refused": [["there", "why", 2]],
        "applied": applied,
    }


@pytest.mark.parametrize(
    ("with_ours", "alike", "told"),
    [
        (seen("passed failed"), True, "1 failed, 1 passed; with 1 failed, 1 passed; 3 calls served"),
        (seen("failed passed"), False, "DIFFERENT  t0: passed without, failed with"),
        (seen("passed"), False, "DIFFERENT  t1: failed without, absent with"),
        (seen("passed failed", served=0), False, "NOTHING WAS SERVED"),
        (seen("passed failed", applied=False), False, "OUR OPS WERE NOT UNDER IT AT THE END"),
        (seen("passed failed", seconds=2.0), True, "2 s of processors without, 4 s with: SLOWER"),
    ],
)  # fmt: skip
def test_what_is_told(run, monkeypatch, capsys, tmp_path, with_ours, alike, told):
    monkeypatch.setattr(run, "_run", lambda *arguments: with_ours if arguments[-1] else seen("passed failed"))
    assert run._is_alike("overcomplete", None) is alike
    assert told in capsys.readouterr().out
    report = json.loads((tmp_path / "overcomplete" / "report.json").read_text())
    assert report["with"] == with_ours


def test_without_an_adapter_or_tests(run, monkeypatch, capsys):
    assert not run._is_alike("sparsify", None)
    assert "sparsify.py is not there" in capsys.readouterr().out
    monkeypatch.setattr(run, "_fetch_tests", lambda *_: None)
    assert run._is_alike("overcomplete", None)
    assert "NO TESTS in its release" in capsys.readouterr().out


def test_every_library_is_pinned(run):
    assert all(run._pinned(suite.distribution)[0].isdigit() for suite in run.SUITES.values())
    with pytest.raises(KeyError, match="nobody's stands in none of"):
        run._pinned("nobody's")


TESTS = """
import pytest, torch

@pytest.fixture
def broken():
    raise ValueError

@pytest.fixture
def leaving():
    yield
    raise ValueError

def test_passes(): assert torch.rand(()) == drawn
def test_fails(): assert 0
def test_skips(): pytest.skip()
@pytest.mark.xfail
def test_is_expected_to_fail(): assert 0
@pytest.mark.xfail
def test_passes_all_the_same(): pass
def test_is_not_set_up(broken): pass
def test_is_not_taken_down(leaving): pass

torch.manual_seed(0)
drawn = torch.rand(())
"""


def test_what_became_of_every_test_is_written_down(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_all.py").write_text(TESTS)
    (tmp_path / "test_none.py").write_text("import nothing_of_the_kind\n")
    (tmp_path / "test_skipped.py").write_text("import pytest; pytest.skip(allow_module_level=True)\n")
    output = tmp_path / "output.json"
    environment = os.environ | {"PYTHONPATH": str(HERE), "FASTSPARSE_PEERS_OUTPUT": str(output)}
    command = (
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "watched",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
    )
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    found = json.loads(output.read_text())
    outcomes = {name.split("::test_")[-1]: test["outcome"] for name, test in found["tests"].items()}
    assert outcomes == {
        "passes": "passed", "fails": "failed", "skips": "skipped", "is_expected_to_fail": "xfailed",
        "passes_all_the_same": "xpassed", "is_not_set_up": "error", "is_not_taken_down": "error",
        "test_none.py": "error", "test_skipped.py": "skipped",
    }  # fmt: skip
    assert (found["served"], found["applied"]) == ({}, False)
