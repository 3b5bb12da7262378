"""``make gpu-test`` itself, rehearsed without a GPU."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gpu import suite
from gpu.suite import Outcome, Part, judge, parts, run, table

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
PLAIN = Part("plain", ("true",))


def python(name: str, code: str, **options) -> Part:
    return Part(name, (sys.executable, "-c", code), **options)


def go(tmp_path, *todo: Part, seconds: float = 30, jobs: int = 2) -> list[Outcome]:
    return run(list(todo), cwd=tmp_path, logs=tmp_path, until=time.time() + seconds, jobs=jobs)


# What files hold whose tests have a GPU's backends for parameters: conftest's fixture, or one of their own.
ON_BACKENDS = re.compile(r"def test_\w+\((?:[^)]*\W)?backend\W|\bGPU_BACKENDS\b|\bbackend_names\b")


def names_of(folder: Path, holding: re.Pattern = re.compile("")) -> set[str]:
    """The files of tests in a folder, by what follows ``test_``."""
    files = (path for path in folder.glob("test_*.py") if holding.search(path.read_text()))
    return {path.stem.removeprefix("test_") for path in files}


def test_every_file_of_tests_has_a_part():
    here = Path(__file__).parent
    assert names_of(here) - {"suite"} == set(suite.OWN)
    assert names_of(here.parent, ON_BACKENDS) == {*suite.OPS, *suite.IN_CUDA}
    assert names_of(here.parent, re.compile("gpu.library is not None")) == set(suite.IN_CUDA)
    names = [part.name for part in parts("python")]
    assert len(set(names)) == len(names)
    assert names[0] == "gpu/here"
    assert {f"kernels/{name}" for name in names_of(here.parent / "kernels")} <= set(names)
    for part in parts("python"):
        assert all(Path(word).exists() for word in part.command if word.endswith(".py"))


def test_outcomes_are_counted_and_named():
    log = """
tests/test_a.py::test_one[a, b] PASSED                                   [ 25%]
tests/test_a.py::test_two SKIPPED (needs a CUDA device)                  [ 50%]
tests/test_a.py::test_three FAILED                                       [ 75%]
FAILED tests/test_a.py::test_three - assert 1 == 2
"""
    out = judge(PLAIN, 1, log, 2.0)
    assert out.verdict == "failed"
    assert out.counts == {"passed": 1, "skipped": 1, "failed": 1}
    assert out.skips == {"needs a CUDA device": 1}
    assert out.faults == ["tests/test_a.py::test_three: assert 1 == 2"]
    assert judge(PLAIN, 0, log.splitlines()[1], 1.0).verdict == "passed"
    assert (
        judge(PLAIN, 0, log.splitlines()[2], 1.0).verdict == "left out"
    )  # where all was skipped nothing ran
    assert judge(PLAIN, 5, "", 1.0).reason == "no test was found"
    assert judge(PLAIN, None, log, 9.0).verdict == "failed"
    text = table([out, Outcome("good", "passed", counts={"passed": 7})])
    assert text.splitlines()[0].startswith("passed")
    assert text.splitlines()[-1] == "2 parts: 1 failed, 1 passed; tests: 1 failed, 8 passed, 1 skipped"


@pytest.mark.parametrize(
    ("kind", "status", "log", "verdict"),
    [
        ("sanitizer", 0, "========= ERROR SUMMARY: 0 errors", "passed"),
        ("sanitizer", 99, "========= Invalid __global__ read of size 4 bytes", "failed"),
        ("sanitizer", 1, "spmm, torch.float32: relative error 0.5", "failed"),
        ("sanitizer", 1, "========= Error: Device not supported. Please refer to", "left out"),
        ("sanitizer", None, "", "failed"),
        ("planted", 99, "========= Invalid __global__ read of size 4 bytes", "passed"),
        ("planted", 0, "========= ERROR SUMMARY: 0 errors", "failed"),
        ("planted", 99, "========= ERROR SUMMARY: 1 error", "failed"),
    ],
)
def test_a_sanitizer_is_believed_only_as_far_as_it_finds(kind, status, log, verdict):
    assert judge(Part("it", (), kind=kind), status, log, 1.0).verdict == verdict


def test_parts_run_at_once_and_are_ended_in_time(tmp_path):
    start = time.time()
    outs = go(
        tmp_path,
        python("hangs", "import time; print('here', flush=True); time.sleep(60)", limit=3.0),
        Part("absent", ("/nonexistent/tool",)),
        python("fails", "raise SystemExit('no')"),
        python("crashes", "import os; os.abort()"),
    )
    assert time.time() - start < 25
    assert [out.name for out in outs] == ["hangs", "absent", "fails", "crashes"]
    assert [out.verdict for out in outs] == ["failed", "left out", "failed", "failed"]
    assert outs[0].reason.endswith("the last line: here")
    assert "tool can't be run" in outs[1].reason
    assert outs[2].reason == "no"


def test_what_the_time_does_not_suffice_for_is_named(tmp_path):
    sleeper = "import time; time.sleep(60)"
    outs = go(tmp_path, python("first", sleeper), python("second", sleeper), seconds=1.0, jobs=1)
    assert [out.verdict for out in outs] == ["failed", "left out"]
    assert outs[1].reason == "the time was up"


@no_gpu
def test_the_command_writes_json_and_says_that_nothing_ran(tmp_path, capsys):
    assert suite.main(["--output", str(tmp_path), "-k", "gpu/here", "--commit", "abc"]) == 1
    result = json.loads((tmp_path / "gpu-test.json").read_text())
    (part,) = result["parts"]
    assert part["verdict"] == "left out"
    assert part["reason"] == "nothing ran: needs a CUDA device"
    assert result["provenance"]["commit"] == "abc"
    assert result["provenance"]["backends"]["reference"]["available"]
    assert "test_backend_is_available" in (tmp_path / "gpu-test.log").read_text()
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
