"""``make gpu-test`` itself, rehearsed without a GPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gpu import suite
from gpu.conftest import require
from gpu.suite import Outcome, Part, judge_sanitizer, run, table

from fastsparse import Backend

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")

PLANTED = """
import os
import signal
import time

import pytest


@pytest.mark.parametrize("backend", ["cuda-gpu", "cpu"])
def test_passes(backend):
    assert backend == "cuda-gpu"  # the other one isn't asked for


def test_fails_on_a_gpu():
    assert 1 == 2


def test_gpu_is_skipped():
    pytest.skip("needs a CUDA device")


def test_gpu_crashes():
    os.abort()


def test_gpu_hangs():
    time.sleep(300)


def test_gpu_is_interrupted():
    time.sleep(1)  # until it is known to be set up
    os.kill(os.getppid(), signal.SIGINT)  # as when the time is up
    time.sleep(300)
"""


def run_tests(tmp_path: Path, monkeypatch, only: str) -> Outcome:
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_planted.py").write_text(PLANTED)
    monkeypatch.setattr(suite, "WORKERS", 1)
    monkeypatch.setattr(suite, "LONGEST", 3 if "hangs" in only else 200)
    part = suite.tests(sys.executable, tmp_path, folder, only)
    part = Part(part.name, (*part.command, f"--rootdir={tmp_path}"), part.environment)
    return run(part, cwd=suite.ROOT, scratch=tmp_path, until=time.time() + 400)


def test_outcomes_are_counted_and_named_whatever_happens_to_a_worker(tmp_path, monkeypatch):
    out = run_tests(tmp_path, monkeypatch, "hangs or not interrupted")
    assert out.verdict == "failed"
    assert out.counts == {"passed": 1, "skipped": 1, "failed": 1, "error": 2}, out
    assert out.skips == {"needs a CUDA device": 1}
    assert not out.left
    faults = {fault.partition(": ")[0].rpartition("::")[2]: fault for fault in out.faults}
    assert faults.keys() == {"test_fails_on_a_gpu", "test_gpu_crashes", "test_gpu_hangs"}
    assert "1 == 2" in faults["test_fails_on_a_gpu"]
    assert all("crashed while running" in faults[name] for name in ("test_gpu_crashes", "test_gpu_hangs"))
    text = table([out, Outcome("good", "passed")])
    assert text.startswith("passed")
    assert text.endswith("2 parts: 1 failed, 1 passed")


def test_what_the_time_does_not_suffice_for_is_named(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell's background jobs have it
    try:
        out = run_tests(tmp_path, monkeypatch, "passes or interrupted")
    finally:
        signal.signal(signal.SIGINT, before)
    assert out.verdict == "failed"
    assert out.counts == {"passed": 1}
    assert out.left == {"tests/test_planted.py": 1}
    assert table([out]).splitlines()[1] == "    not run: 1 of tests/test_planted.py"
    sleeps = Part("tests", (sys.executable, "-c", "import time; time.sleep(60)"))
    out = run(sleeps, cwd=tmp_path, scratch=tmp_path / "tests", until=time.time() + 1)
    assert (out.verdict, out.reason) == ("failed", "the time was up")


def test_large_tests_have_the_gpu_to_themselves(tmp_path, monkeypatch):
    happened = []

    def record(part, **_) -> Outcome:
        happened.append(("begin", part))
        time.sleep(0.2)
        happened.append(("end", part))
        return Outcome(part.name, "passed")

    monkeypatch.setattr(suite, "run", record)
    assert suite.main(["--output", str(tmp_path)]) == 0
    steps = [(step, part.name) for step, part in happened]
    assert steps.index(("end", "tests")) < steps.index(("begin", "large tests"))
    of = {part.name: part.command for _, part in happened}
    assert f"--ignore={suite.TESTS / suite.LARGE}" in of["tests"]
    assert str(suite.TESTS / suite.LARGE) in of["large tests"]
    assert "-n1" in of["large tests"]
    late = run(Part("tests", ("true",)), cwd=tmp_path, scratch=tmp_path, until=time.time() - 1)
    assert (late.verdict, late.reason) == ("failed", "the time was up")


@pytest.mark.parametrize(
    ("name", "status", "log", "verdict"),
    [
        ("memcheck", 0, "========= ERROR SUMMARY: 0 errors", "passed"),
        ("memcheck", 99, "========= Invalid __global__ read of size 4 bytes", "failed"),
        ("memcheck", 1, "spmm, torch.float32: relative error 0.5", "failed"),
        ("memcheck", 1, "========= Error: Device not supported. Please refer to", "left out"),
        ("memcheck", None, "", "failed"),
        ("planted", 99, "========= Invalid __global__ read of size 4 bytes", "passed"),
        ("planted", 0, "========= ERROR SUMMARY: 0 errors", "failed"),
        ("planted", 99, "========= ERROR SUMMARY: 1 error", "failed"),
    ],
)
def test_a_sanitizer_is_believed_only_as_far_as_it_finds(name, status, log, verdict):
    assert judge_sanitizer(f"sanitizer, {name}", status, log, Path()).verdict == verdict


@pytest.mark.parametrize(("insisted", "outcome"), [("1", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_a_backend_that_does_not_load_is_no_pass(tmp_path, monkeypatch, insisted, outcome):
    assert suite.tests(sys.executable, tmp_path, tmp_path, "").environment["FASTSPARSE_CUDA"] == "1"
    monkeypatch.setenv("FASTSPARSE_CUDA", insisted)
    broken = Backend(name="cuda", available=False, detail="the library could not be loaded")
    with pytest.raises(outcome, match="could not be loaded"):
        require(broken)


def test_a_tool_that_is_absent_is_left_out(tmp_path):
    out = run(Part("x", ("/nonexistent/tool",)), cwd=tmp_path, scratch=tmp_path, until=time.time() + 9)
    assert (out.verdict, out.reason) == ("left out", "tool can't be run: No such file or directory")


@no_gpu
def test_the_command_writes_json_and_says_that_nothing_ran(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(suite, "WORKERS", 1)
    monkeypatch.setattr(suite, "TESTS", suite.TESTS / "gpu")
    assert suite.main(["--output", str(tmp_path), "-k", "test_here", "--commit", "abc"]) == 1
    result = json.loads((tmp_path / "gpu-test.json").read_text())
    (part,) = result["parts"]
    assert part["verdict"] == "left out"
    assert part["reason"].endswith("needs a CUDA device")
    assert result["provenance"]["commit"] == "abc"
    assert result["provenance"]["backends"]["reference"]["available"]
    assert "skipped" in (tmp_path / "gpu-test.log").read_text()
    assert "left out" in capsys.readouterr().out


@no_gpu
@pytest.mark.parametrize("verb", ["gpu-test", "gpu-bench"])
def test_without_a_gpu_make_says_so_at_once(tmp_path, verb):
    root = suite.ROOT
    if not (root / "Makefile").exists():
        pytest.skip("not in a checkout")
    done = subprocess.run(
        ["make", verb, f"PYTHON={sys.executable}", f"OUT={tmp_path}"],
        cwd=root, capture_output=True, text=True, timeout=120,
        env={key: value for key, value in os.environ.items() if not key.startswith("MAKE")},
    )  # fmt: skip
    assert done.returncode != 0
    assert "needs what this machine doesn't have" in done.stderr
    assert "CUDA" in done.stderr
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named():
    script = str(suite.ROOT / "tests/gpu/ready.py")
    done = subprocess.run(
        [sys.executable, script, "no_such_module"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "the Python packages no_such_module: WHEELS=folder" in done.stderr


def test_the_tests_can_be_rehearsed():
    """A few of them, on CPU tensors: what they do outside CUDA's own functions is tried here."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/gpu/test_training.py", "tests/gpu/test_machinery.py",
         "-k", "training or opcheck or double"],
        cwd=suite.ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "REHEARSE_GPU_TESTS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
