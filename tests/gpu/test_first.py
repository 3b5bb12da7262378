"""``make gpu-first`` itself, rehearsed without a GPU: on CPU tensors, faults planted in three ops."""

import os
import subprocess
import sys
import tarfile
import time
from dataclasses import replace

import pytest
import torch
from gpu import checked, first, suite, tensor_cores

import fastsparse
from fastsparse.ops._library import OPS

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
HERE = "cpu" if fastsparse.backends()["cpu"].available else "reference"

# In the place of checked.py: one op crashes, one hangs, one is wrong.
PLANTED = """
import os
import sys
import time

op = sys.argv[sys.argv.index("--op") + 1]
print("launches that block:", os.environ.get("CUDA_LAUNCH_BLOCKING", "0"), flush=True)
if op == "crashes":
    os.abort()
if op == "hangs":
    time.sleep(300)
if op == "is_wrong":
    sys.exit("wrong: is_wrong: relative error 0.5")
print("all right")
"""


def test_every_op_with_a_kernel_is_checked():
    assert set(first.OPS) == {name for name, op in OPS.items() if {"cuda", "triton"} & set(op.kernels)}


def test_a_fault_of_one_op_costs_no_other_op_anything(tmp_path, monkeypatch, capsys):
    script, out = tmp_path / "planted.py", tmp_path / "out"
    script.write_text(PLANTED)
    for name, value in {
        "CHECK": script, "OPS": ("crashes", "hangs", "is_wrong", "is_right"), "BACKENDS": (HERE,),
        "CHECKING": 5, "BENCHES": ("linear_recurrence",),
    }.items():  # fmt: skip
        monkeypatch.setattr(first, name, value)
    monkeypatch.setattr(suite, "WORKERS", 1)
    assert first.main(["--quick", "--output", str(out), "--package", str(suite.ROOT), "--commit", "abc"]) == 1
    assert {path.name for path in out.iterdir()} == {"gpu-first.txt", "gpu-first.tar.gz"}
    text = (out / "gpu-first.txt").read_text()
    assert text == capsys.readouterr().out
    lines = text.splitlines()
    judged = [line for line in lines if line.startswith(("passed ", "failed ", "left out "))]
    verdicts = {line.split(" s  ")[1].partition(": ")[0]: line for line in judged}
    failed = [name for name, line in verdicts.items() if line.startswith("failed")]
    assert failed == [f"crashes, {HERE}", f"hangs, {HERE}", f"is_wrong, {HERE}", f"crashes, {HERE}, again"]
    passed = [name for name, line in verdicts.items() if line.startswith("passed")]
    assert passed == ["what is here", f"is_right, {HERE}", "tensor cores", "benchmarks", "tests"]
    assert "SIGABRT" in verdicts[f"crashes, {HERE}"]
    assert verdicts[f"hangs, {HERE}"].endswith("the time was up; launches that block: 0")
    assert "    wrong: is_wrong: relative error 0.5" in lines
    assert "all within what is assumed" in text
    with tarfile.open(out / "gpu-first.tar.gz") as archive:
        names = {name.removeprefix("gpu-first/") for name in archive.getnames()}
        logs = {
            name: archive.extractfile(f"gpu-first/{name}, {HERE}{again}.log").read().decode()
            for name, again in (("crashes", ""), ("crashes", ", again"))
        }
    assert "launches that block: 1" in logs["crashes"]
    assert {"gpu-first.json", "tests.xml", "benchmarks/table.txt"} <= names
    assert any(name.endswith("/linear_recurrence.json") for name in names)


def test_what_there_is_when_the_time_is_up_is_written(tmp_path):
    words = ["--quick", "--output", str(tmp_path), "--package", str(suite.ROOT), "--until", str(time.time())]
    assert first.main(words) == 1
    *parts, total = (tmp_path / "gpu-first.txt").read_text().splitlines()
    assert total == f"{len(parts)} parts: {len(parts)} failed"
    assert all(part.endswith(": the time was up") for part in parts)
    assert (tmp_path / "gpu-first.tar.gz").exists()


def test_an_answer_is_held_against_the_definition(monkeypatch, capsys):
    monkeypatch.setattr(checked, "SIZES", checked.SIZES[:1])
    monkeypatch.setattr(checked, "AWKWARD", ())
    arguments = ["--op", "spmm_t", "--backend", HERE, "--device", "cpu"]
    assert checked.main(arguments) == 0
    off = replace(OPS["spmm_t"], reference=lambda *given: 1.5 * OPS["spmm_t"].reference(*given))
    monkeypatch.setattr(checked, "OPS", {"spmm_t": off})
    assert checked.main(arguments) == 1
    said = capsys.readouterr().out
    assert "integers differ" in said
    assert "relative error 0.333" in said


def test_a_sum_beyond_what_is_assumed_is_found(monkeypatch, capsys):
    def cut(x, w):  # to 12 bits
        return tensor_cores.by_torch(x, w).view(torch.int32).bitwise_and(~0xFFF).view(torch.float32)

    monkeypatch.setattr(tensor_cores, "ways", lambda: {"cut": cut})
    assert tensor_cores.main(["--device", "cpu"]) == 1
    assert "wrong: D=64, cut" in capsys.readouterr().out


@no_gpu
def test_without_a_gpu_make_says_so_and_writes_it_down(tmp_path):
    if not (suite.ROOT / "Makefile").exists() or (suite.ROOT / "build/gpu/fastsparse").exists():
        pytest.skip("not in a checkout, or in one where kernels for a GPU were built")
    done = subprocess.run(
        ["make", "gpu-first", f"PYTHON={sys.executable}", f"OUT={tmp_path}"],
        cwd=suite.ROOT, capture_output=True, text=True, timeout=120,
        env={key: value for key, value in os.environ.items() if not key.startswith("MAKE")},
    )  # fmt: skip
    assert done.returncode != 0
    text = (tmp_path / "gpu-first.txt").read_text()
    assert text.splitlines()[-1] == "1 parts: 1 failed"
    with tarfile.open(tmp_path / "gpu-first.tar.gz") as archive:
        log = archive.extractfile("gpu-first/build.log").read().decode()
    assert "needs what this machine doesn't have" in log
