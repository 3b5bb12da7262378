"""What keeps a GPU's benchmarks within their time, and says what was measured: tried without a GPU."""

import json
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import cases, choice, provenance, report, results, traced, worker
from benchmarks.harness import Contender, measure
from benchmarks.lab import EventClock, Job, Lab
from benchmarks.shapes import Given, Sequences

CHOSEN = command.parse(["--device", "cuda", "--commit", "abc", "--seconds", "1"])
GIVEN = Given(Sequences("shape", 1, 1, 1))


def collected(log, ended: str) -> dict:
    (result,) = command.collect(list(worker.lines(log)), ended, ["spmm_t"], CHOSEN)
    return result


def test_a_trial_of_a_gpu(tmp_path, capsys):
    pytest.importorskip("triton")  # the atomic baselines run in its interpreter
    arguments = ["sae_step", "--device", "cuda", "--quick", "--trace", "--output", str(tmp_path)]
    assert command.main(arguments) == 0, (tmp_path / "gpu-bench.log").read_text()
    files = {path.stem: results.read(path) for path in tmp_path.glob("*/*.json")}
    assert files.keys() == {"sae_step"}
    for result in files.values():
        assert result["quick"]
        assert not result["left_out"]
        products = {"product_bf16", "product_fp32"}
        assert result["ceilings"].keys() == {"copy", "gather_l2", "gather_memory"} | products
        assert not any(bar["passed"] or bar["measured"] is not None for bar in result["bars"])
        for case in result["cases"]:
            assert case["ratios"]["fastsparse"]["torch"]["of_medians"] > 0
            assert case["contenders"]["openai's way"]["check"], case
            kernels = case["contenders"]["fastsparse, reference"]["kernels"]
            assert any(
                one["kernel"].startswith("aten::") and one["calls"] and one["us"] > 0 for one in kernels
            )
    assert len(files["sae_step"]["bars"]) == 4
    out = capsys.readouterr().out.strip()
    assert out.startswith("a trial: these figures mean nothing")
    assert out in (tmp_path / "table.txt").read_text()
    assert report.main(["--results", str(tmp_path), "--root", str(tmp_path / "none")]) == 2


def test_a_fault_of_one_case_is_left_out_and_the_rest_is_run(tmp_path, monkeypatch):
    def fails():
        raise RuntimeError("planted")

    good = {"contenders": {}, "ratios": {}}
    jobs = [Job("spmm_t", "bad", GIVEN, fails), Job("spmm_t", "good", GIVEN, lambda: good)]
    monkeypatch.setattr(worker, "jobs_of", lambda *arguments: jobs)
    log, again = tmp_path / "log", {"device": "cuda", "quick": True}
    assert worker.work(log, ["spmm_t"], **again) == 0
    before = log.read_text()
    assert worker.work(log, ["spmm_t"], **again) == 0
    assert log.read_text() == before  # another worker finds nothing left to do
    result = collected(log, "")
    assert [case["name"] for case in result["cases"]] == ["good"]
    assert result["left_out"] == [{"name": "bad", "reason": "RuntimeError: planted"}]


def test_what_a_killed_worker_leaves_is_reported(tmp_path):
    bar = {"name": "fast", "relation": ">=", "required": 2.0, "measured": None, "unit": "x", "note": ""}
    log = tmp_path / "log"
    lines = [
        {"ceilings": {"copy": 1.0}, "provenance": {"commit": None}},
        {"plan": [{"bench": "spmm_t", "job": "hangs", "bars": [bar | {"passed": False}]}]},
        {"bench": "spmm_t", "job": "hangs", "begun": 1.0},
    ]
    log.write_text("\n".join(map(json.dumps, lines)) + '\n{"bench": "spmm_t", "jo')
    result = collected(log, "killed")
    assert result["provenance"]["commit"] == "abc"
    assert result["left_out"] == [{"name": "hangs", "reason": "killed"}]
    assert result["bars"][0]["note"] == "killed"
    assert "not measured  fast" in command.summary([result])


@pytest.mark.parametrize(
    ("until", "patience", "why"), [(0.5, 60, "the time was up"), (60, 0.5, "killed after")]
)
def test_a_worker_that_hangs_is_ended(tmp_path, monkeypatch, until, patience, why):
    monkeypatch.setattr(command, "PATIENCE", patience)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert command.watch(process, tmp_path / "none", time.time() + until).startswith(why)
    assert process.poll() is not None


def test_a_worker_that_keeps_dying_ends_the_run(tmp_path, monkeypatch):
    chosen = Namespace(**vars(CHOSEN) | {"names": ["spmm_t"], "package": tmp_path})
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (tmp_path / "noise").open("w") as noise:
        why = command.run(tmp_path / "log", chosen, time.time() + 60, noise)
    assert why == "its process ended with status 1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert command.main(["--device", "cuda", "--output", str(tmp_path)]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/*.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "bench must be among topk_encode"),
        (["--threads", "0"], "at least 1"),
        (["--seconds", "0"], "above 0"),
        (["--seconds", "nan"], "above 0"),
        (["--choice"], "needs --device cuda"),
        (["--trace"], "needs --device cuda"),
        (["--device", "cuda", "--peers"], "are for a CPU"),
        (["--device", "tpu"], "invalid choice"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.parse(arguments)
    assert message in capsys.readouterr().err


def test_a_contender_whose_turn_comes_too_late_is_left_out():
    timings = measure([Contender("late", lambda: None, str)], seconds=1.0, until=time.monotonic() - 1)
    assert timings["late"].failure == "left out: the time was up"


def test_events_enclose_the_call_alone(monkeypatch):
    happened = []

    class Event:
        def __init__(self, *, enable_timing):
            self.name = "start" if not happened else "end"
            happened.append(f"new {self.name}")

        def record(self):
            happened.append(f"record {self.name}")

        def synchronize(self):
            happened.append("wait")

        def elapsed_time(self, end):
            return 2.5  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: happened.append("spin"), raising=False)
    clock = EventClock(torch.device("cpu"))
    clock.buffer = SimpleNamespace(sum=lambda: happened.append("flush"))
    assert clock(lambda: happened.append("call"))() == 2.5e-3
    assert happened[2:] == ["flush", "spin", "record start", "call", "record end", "wait"]


def test_what_was_tuned_is_told_the_fastest_first(monkeypatch):
    launch = pytest.importorskip("fastsparse.kernels._launch")
    slow, fast = launch.Configuration(4, 4), launch.Configuration(1, 8)
    key = ("spmm", torch.device("cpu"), torch.bfloat16, 4096)
    monkeypatch.setattr(launch, "timed", {"an earlier case's": {}, key: {slow: 2.0, fast: 0.5}})
    (found,) = traced.tuned(1)
    assert found["key"] == ["spmm", "torch.bfloat16", "4096"]
    assert found["us"] == [[{"warps": 1, "unroll": 8}, 50.0], [{"warps": 4, "unroll": 4}, 200.0]]
    text = cases.lines({"contenders": {}, "tuned": [found]})
    assert text == "  tuned: spmm torch.bfloat16 4096: {'warps': 1, 'unroll': 8}"


def test_less_important_cases_are_left_out():
    trial = Lab(torch.device("cpu"), gpu=True, quick=True, backends=("reference",))
    every = worker.jobs_of(trial, ["topk_encode"])
    first = worker.jobs_of(replace(trial, priority=0), ["topk_encode"])
    assert [job.given.priority for job in first] == [0] * 4
    assert len(every) > len(first)
    taken_apart = worker.jobs_of(replace(trial, trace=True), ["topk_encode"])
    assert sum(job.name.endswith("blocks in reference") for job in taken_apart) == 4


def test_provenance_of_a_gpu(monkeypatch):
    device = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=140 << 30
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    origin = provenance.gpu_provenance()
    assert origin["machine"] == "gpu-nvidia-h200"
    assert origin["gpu_memory_gib"] == 140
    assert set(origin["backends"]) == {"triton", "cuda"}
    json.dumps(origin)


def choice_result(**seconds: float) -> dict:
    contenders = {f"fastsparse, {name}": {"median": value, "unit": "s"} for name, value in seconds.items()}
    return {"bench": "spmm", "cases": [{"name": "N=1, bf16", "dtype": "bf16", "contenders": contenders}]}


def test_the_choice_is_the_faster_and_a_tie_is_a_tie():
    ((op, dtype, _, _, better),) = choice.compare([choice_result(triton=2.0, cuda=1.0)])
    assert (op, dtype, better) == ("spmm", "bf16", "cuda")
    assert choice.compare([choice_result(triton=1.0, cuda=1.02)])[0][-1] == "either"
    assert choice.compare([choice_result(triton=1.0)]) == []
    text = choice.table([choice_result(triton=2.0, cuda=1.0), choice_result(triton=1.0, cuda=1.5)])
    last = text.splitlines()[-1]
    assert last.startswith("spmm, bf16: cuda, at worst 1.50x the other's time; the other at: N=1")
    assert choice.table([]) == "no case was run by both backends"


def test_solvers_are_listed_the_fastest_first():
    of = {"triton": 2.0, "cuda": 1.5, "triton, newton": 2.0, "cuda, sequential": 1.0, "cuda, shooting": 3}
    (found,) = choice.solvers([choice_result(**of)])
    assert found == ("spmm, N=1, bf16", {"cuda, sequential": 1.0, "triton, newton": 2.0, "cuda, shooting": 3})
    last = choice.table([choice_result(**of)]).splitlines()[-1]
    assert last.startswith("spmm, N=1, bf16: cuda, sequential 1 s  triton, newton 2 s")


def test_the_page_says_whether_a_gpu_was_measured(tmp_path):
    origin = provenance.provenance()
    case = {
        "name": "a", "shape": {"N": 1}, "headline": True, "ratios": {},
        "contenders": {"fastsparse": {"median": 1.0, "unit": "s"}},
    }  # fmt: skip
    base = {"bench": "spmm_t", "peers": False, "quick": False, "cases": [case], "bars": []}
    results.write(tmp_path / "cpu-a" / "spmm_t.json", base | {"provenance": origin})
    assert report.NO_GPU in report.render(tmp_path)
    gpu = {"gpu": "NVIDIA H200", "gpu_memory_gib": 140, "cuda": "13.0", "versions": {"triton": "3.6.0"}}
    results.write(tmp_path / "gpu-b" / "spmm_t.json", base | {"provenance": origin | gpu})
    text = report.render(tmp_path)
    assert report.NO_GPU not in text
    assert "Measured on NVIDIA H200 (140 GiB), CUDA 13.0, Triton 3.6.0, torch" in text
