"""The measurements on a GPU, rehearsed without one: everything runs but the GPU."""

import json
import subprocess
import sys
import time
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

import fastsparse
from benchmarks import provenance, report, results, shapes
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import bench_sddmm, bench_topk_encode, choice, worker
from benchmarks.gpu.lab import EventClock, Job, Lab
from benchmarks.harness import Contender, measure

CEILINGS = {"copy": 1e9, "gather_l2": 1e9}
HEADLINE = shapes.GPU_HEADLINE[0]


@pytest.fixture
def lab() -> Lab:
    return Lab.open(rehearsal=True, seconds=0.1, until=time.monotonic() + 600)


def test_a_whole_run(tmp_path, capsys):
    pytest.importorskip("triton")  # the atomic baselines run in its interpreter
    assert command.main(["--rehearse", "--output", str(tmp_path), "--until", str(time.time() + 600)]) == 0
    files = {name: results.read(tmp_path / f"{name}.json") for name in results.GPU_BENCHES}
    for name, result in files.items():
        assert result["quick"]
        assert not result["left_out"]
        assert result["ceilings"].keys() == {
            "copy",
            "product_bf16",
            "product_fp32",
            "gather_l2",
            "gather_memory",
        }
        assert not any(bar["passed"] or bar["measured"] is not None for bar in result["bars"])
        for case in result["cases"]:
            for who in ("fastsparse", "fastsparse, reference", "torch"):
                assert case["contenders"][who]["check"], (name, case["name"], who)
            assert case["ratios"]["fastsparse"]["torch"]["of_medians"] > 0
    assert [len(files[name]["bars"]) for name in results.GPU_BENCHES] == [10, 4, 0, 0, 0, 4, 2, 2, 2]
    assert len(files["topk_encode"]["cases"]) == 18
    encode = files["topk_encode"]["cases"][0]["contenders"]
    assert encode["product bf16"]["median"] > 0
    assert encode["fastsparse"]["roofline"]["share"] > 0
    assert encode["linear + flashinfer.top_k"]["failure"].startswith("ModuleNotFoundError")
    for name, who in (
        ("sparse_decode", "openai's way"),
        ("spmm_t", "openai's way"),
        ("sae_step", "sparsify's way"),
    ):
        assert all(case["contenders"][who]["check"] for case in files[name]["cases"]), name
    for name in ("gru_recurrence", "lstm_recurrence"):
        assert len(files[name]["cases"]) == 6
        forward, *_ = files[name]["cases"]
        assert forward["contenders"]["fastsparse, cpu, shooting"]["check"]
        assert forward["contenders"]["pararnn-torch, Newton"]["failure"].startswith("ModuleNotFoundError")
        assert forward["contenders"]["fastsparse"]["roofline"]["share"] > 0
    out = capsys.readouterr().out
    assert out.startswith("a rehearsal: these figures mean nothing")
    assert out.strip() in (tmp_path / "table.txt").read_text()
    assert report.main(["--results", str(tmp_path.parent), "--readme", str(tmp_path / "none.md")]) == 2


def test_a_wrong_kernel_gets_no_figure(lab, monkeypatch):
    right = fastsparse.sddmm
    monkeypatch.setattr(fastsparse, "sddmm", lambda *arguments: right(*arguments) * 1.1)
    case = bench_sddmm.case(lab, CEILINGS, "wrong", HEADLINE, "gaussian", "fp32", alone=True)
    assert case["contenders"]["fastsparse"]["failure"].startswith("wrong answer: out: relative error 0.1")


def test_a_call_that_fails_is_a_bar_without_a_figure(lab, monkeypatch):
    def broken(*arguments, **options):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(fastsparse, "topk_encode", broken)
    (job,) = (
        job for job in bench_topk_encode.jobs(lab, CEILINGS) if job.name == f"{HEADLINE.name}, gaussian, bf16"
    )
    bars = job.bars(job.run())
    assert [bar.verdict for bar in bars] == ["not measured"] * 3
    assert all("none left" in bar.note for bar in bars)


def test_a_fault_of_one_case_is_left_out_and_the_rest_is_run(tmp_path, monkeypatch):
    def fails():
        raise RuntimeError("planted")

    jobs = [Job(0, "sddmm", "bad", fails), Job(1, "sddmm", "good", lambda: {"name": "good"})]
    monkeypatch.setattr(worker, "jobs_of", lambda *arguments: jobs)
    log = tmp_path / "log"
    again = {"rehearsal": True, "seconds": 0.1, "until": time.monotonic() + 60}
    assert worker.work(log, ["sddmm"], **again) == 0
    before = log.read_text()
    assert worker.work(log, ["sddmm"], **again) == 0
    assert log.read_text() == before  # another worker finds nothing left to do
    (result,) = command.collect(list(worker.lines(log)), "", ["sddmm"], quick=False, commit="abc")
    assert [case["name"] for case in result["cases"]] == ["good"]
    assert result["left_out"] == [{"name": "bad", "reason": "RuntimeError: planted"}]


def test_what_a_killed_worker_leaves_is_reported(tmp_path):
    bar = {
        "name": "fast",
        "relation": ">=",
        "required": 2.0,
        "measured": None,
        "unit": "x",
        "note": "not run",
    }
    log = tmp_path / "log"
    lines = [
        {"ceilings": {"copy": 1.0}, "provenance": {"commit": None}},
        {"plan": [{"bench": "sddmm", "job": "hangs", "bars": [bar | {"passed": False}]}]},
        {"bench": "sddmm", "job": "hangs", "begun": 1.0},
    ]
    log.write_text("\n".join(map(json.dumps, lines)) + '\n{"bench": "sddmm", "jo')
    (result,) = command.collect(list(worker.lines(log)), "killed", ["sddmm"], quick=False, commit="abc")
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
    chosen = Namespace(seconds=1.0, rehearse=True, package=tmp_path)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (tmp_path / "noise").open("w") as noise:
        why = command.run(tmp_path / "log", ["sddmm"], chosen, time.time() + 60, noise)
    assert why == "its process ended with status 1"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert command.main(["--output", str(tmp_path)]) == 2
    assert "gpu-bench needs a CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "bench must be among topk_encode"),
        (["--choice", "sddmm"], "name no bench beside it"),
        (["--seconds", "0"], "above 0"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.parse([*arguments, "--output", str(tmp_path)])
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
    clock.buffer = SimpleNamespace(zero_=lambda: happened.append("flush"))
    assert clock(lambda: happened.append("call"))() == 2.5e-3
    assert happened[2:] == ["flush", "spin", "record start", "call", "record end", "wait"]


def test_provenance_of_a_gpu(monkeypatch):
    device = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=140 << 30
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    origin = provenance.gpu_provenance("abc")
    assert origin["machine"] == "gpu-nvidia-h200"
    assert origin["gpu_memory_gib"] == 140
    assert set(origin["backends"]) == {"triton", "cuda"}
    json.dumps(origin)


def choice_result(**seconds: float) -> dict:
    contenders = {f"fastsparse, {name}": {"median": value, "unit": "s"} for name, value in seconds.items()}
    case = {"name": "spmm, bf16, N=1", "dtype": "bf16", "contenders": contenders}
    return {"bench": "choice", "cases": [case]}


def test_the_choice_is_the_faster_and_a_tie_is_a_tie():
    ((op, dtype, _, _, better),) = choice.compare([choice_result(triton=2.0, cuda=1.0)])
    assert (op, dtype, better) == ("spmm", "bf16", "cuda")
    assert choice.compare([choice_result(triton=1.0, cuda=1.02)])[0][-1] == "either"
    assert choice.compare([choice_result(triton=1.0)]) == []
    text = choice.table([choice_result(triton=2.0, cuda=1.0), choice_result(triton=1.0, cuda=1.5)])
    assert text.splitlines()[-1].startswith(
        "spmm, bf16: cuda, at worst 1.50x the other's time; the other at: spmm"
    )
    assert choice.table([]) == "no case was run by both backends"


def test_solvers_are_listed_the_fastest_first():
    seconds = {
        "triton": 2.0,
        "cuda": 1.5,
        "triton, newton": 2.0,
        "cuda, sequential": 1.0,
        "cuda, shooting": 3,
    }
    assert choice.solvers([choice_result(**seconds)]) == [
        ("spmm, bf16, N=1", {"cuda, sequential": 1.0, "triton, newton": 2.0, "cuda, shooting": 3}),
    ]
    assert (
        choice.table([choice_result(**seconds)])
        .splitlines()[-1]
        .startswith("spmm, bf16, N=1: cuda, sequential 1 s  triton, newton 2 s")
    )


def test_the_grid_of_the_choice_runs(lab):
    jobs = worker.jobs_of(lab, CEILINGS, ["choice"])
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names) == 96 + 36
    for job in jobs[:14]:  # every op in both dtypes
        case = job.run()
        assert all("median" in case["contenders"][who] for who in ("fastsparse", "fastsparse, reference")), (
            case
        )


def test_the_readme_says_whether_a_gpu_was_measured(tmp_path):
    origin = provenance.provenance()
    case = {
        "name": "a", "shape": {"N": 1}, "headline": True, "ratios": {},
        "contenders": {"fastsparse": {"median": 1.0, "unit": "s"}},
    }  # fmt: skip
    base = {"bench": "spmm_t", "peers": False, "quick": False, "cases": [case], "bars": []}
    results.write(tmp_path / "cpu-a" / "spmm_t.json", base | {"provenance": origin})
    readme = tmp_path / "README.md"
    assert report.NO_GPU in report.render(tmp_path, readme)
    gpu = {"gpu": "NVIDIA H200", "gpu_memory_gib": 140, "cuda": "13.0", "versions": {"triton": "3.6.0"}}
    results.write(tmp_path / "gpu-b" / "spmm_t.json", base | {"provenance": origin | gpu})
    text = report.render(tmp_path, readme)
    assert report.NO_GPU not in text
    assert "Measured on NVIDIA H200 (140 GiB), CUDA 13.0, Triton 3.6.0, torch" in text
