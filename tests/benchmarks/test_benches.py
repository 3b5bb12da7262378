"""The benches themselves, of a CPU and of a GPU without one, at shapes so small that figures mean nothing."""

import importlib
import inspect
import re
from dataclasses import replace
from functools import partial

import pytest
import torch

import fastsparse
from benchmarks import __main__ as command
from benchmarks import (
    bench_gated_recurrence,
    bench_memory,
    bench_recurrence_length,
    data,
    lab,
    pursuits,
    results,
    shapes,
    steps,
)
from benchmarks.checks import close_all
from benchmarks.harness import WrongAnswer
from benchmarks.lab import Lab
from benchmarks.recurrences import GRU, LSTM, SOLVERS, Layer
from benchmarks.shapes import Sequences, Shape
from benchmarks.worker import jobs_of
from fastsparse.ops._library import OPS

SMALL = Shape("small", 8, 16, 64, 4, correlated=True)
KNOWN = {"copy": 1e9, "gather_l2": 1e9}
TRIAL = Lab(torch.device("cpu"), quick=True)


@pytest.fixture(scope="module")
def a_run(small, tmp_path_factory):
    """The result files of a run of everything on a CPU, by name."""
    measure = bench_memory._measure
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        few = {"median": 1e9, "unit": "bytes"}  # spares a process each
        patch.setattr(bench_memory, "_measure", lambda *a: few if a[1] == "torch" else measure(*a))
        assert command.main(["--quick", "--output", str(folder)]) == 0
    return {path.stem: results.read(path) for path in folder.glob("*/*.json")}


def cases_of(result: dict) -> dict[str, dict]:
    return {case["name"]: case for case in result["cases"]}


def test_every_bench_is_measured_and_written(a_run):
    assert a_run.keys() == results.BENCHES.keys() - {"drop_in"}  # which is of peers alone
    for bench, result in a_run.items():
        assert result["quick"]
        assert not result["left_out"]
        assert result["ceilings"]["copy"] > 0
        for case in result["cases"]:
            records = case["contenders"]
            assert all(record.get("check") for who, record in records.items() if who != "torch"), case
            if "fastsparse" in records and bench != "memory":
                record = records["fastsparse"]
                assert 0 < record["q1"] <= record["median"] <= record["q3"]


def test_what_cases_hold(a_run):
    encode, decode = (cases_of(a_run[name]) for name in ("topk_encode", "sparse_decode"))
    assert list(encode) == ["small, gaussian", "small, gaussian, bf16", "small, correlated"]
    first = encode["small, gaussian"]
    assert first["ratios"]["fastsparse"]["torch"]["of_medians"] > 0
    assert {"product fp32", "product bf16", "fastsparse, AVX2 forced"} <= first["contenders"].keys()
    assert first["contenders"]["fastsparse"]["roofline"]["bytes"] > 0
    assert len(a_run["topk_encode"]["bars"]) == 4
    *both, threads = (case for name, case in decode.items() if "ragged" not in name)
    assert len(both) == 4  # both directions on both kinds of data
    assert threads["differing"] == 0
    for direction in ("forward", "backward"):
        assert decode[f"small, gaussian, {direction}, ragged"]["ratios"]["fastsparse"]["fixed k"]
    pursuit = cases_of(a_run["matching_pursuit"])
    assert list(pursuit) == [
        "small, gaussian, kept dictionary", "small, gaussian, new dictionary",
        "small, correlated, kept dictionary", "small, correlated, new dictionary",
        "wide, gaussian, new dictionary", "long, gaussian", "MP-SAE step",
    ]  # fmt: skip
    assert pursuit["wide, gaussian, new dictionary"]["contenders"]["torch"]["share"] == 0.25
    energy, choices = a_run["matching_pursuit"]["bars"][-2:]
    assert energy["passed"]
    assert choices["measured"] == 0
    for name in ("gru_recurrence", "lstm_recurrence"):
        forward, *_, last = a_run[name]["cases"]
        assert {"copy", "torch loop", "fastsparse, newton"} <= forward["contenders"].keys()
        assert last["name"] == "error, weights of scale 4, T=33"
        errors = [bar for bar in a_run[name]["bars"] if "error" in bar["name"]]
        assert len(errors) == 2 * len(bench_gated_recurrence.SCALES)
        assert all(bar["passed"] for bar in errors)
    assert len(a_run["recurrence_length"]["cases"]) == 8  # two lengths, two widths, forward and backward
    assert all(bar["measured"] is not None for bar in a_run["dispatch"]["bars"] + a_run["memory"]["bars"])


def test_a_gpus_cases_run_without_one(small):
    """The most important of every bench; all are run by the device's own trial."""
    trial = Lab.open("cuda", quick=True, known=KNOWN)
    ours = ["fastsparse", *(f"fastsparse, {name}" for name in trial.backends)]
    for bench in results.BENCHES:
        for job in jobs_of(trial, [bench])[:2]:
            case = job.case(trial)
            assert all("median" in case["contenders"][who] for who in ours), (bench, case)
            assert len(job.bars(case)) == len(job.bars(job.nothing("not run")))


def test_a_choice_has_every_op_with_several_kernels(small):
    trial = Lab.open("cuda", quick=True, known=KNOWN, choice=True)
    jobs = jobs_of(trial, results.BENCHES)
    assert len({(job.bench, job.name) for job in jobs}) == len(jobs)
    chosen = {{"sparse_decode": "spmm"}.get(job.bench, job.bench) for job in jobs}
    several = {name for name, op in OPS.items() if {"cuda", "triton"} <= set(op.kernels)}
    assert chosen == {name for name in several if not name.endswith(("_backward", "_step"))}
    for bench in ("sddmm", "gru_recurrence"):
        job = jobs_of(trial, [bench])[0]
        assert {name.partition(",")[0] for name in job.case(trial)["contenders"]} == {"fastsparse"}


@pytest.mark.parametrize(
    ("op", "message"),
    [
        ("topk_encode", "values differ"),
        ("threshold_encode", "values differ"),
        ("sddmm", "out: relative error 0.001"),
        ("matching_pursuit", "not its atom's"),
        ("gru_recurrence", "h: relative error 0.001"),
        ("linear_recurrence", "h: relative error 0.001"),
    ],
)
def test_a_wrong_kernel_gets_no_figure(monkeypatch, small, op, message):
    right = getattr(fastsparse, op)

    def wrong(*arguments, **options):
        found = right(*arguments, **options)
        if isinstance(found, torch.Tensor):
            return found * 1.001
        parts = found[0] * 1.001, *found[1:]
        return type(found)(*parts) if hasattr(found, "_fields") else parts

    monkeypatch.setattr(fastsparse, op, wrong)
    job = jobs_of(TRIAL, [op])[0]
    record = job.case(TRIAL)["contenders"]["fastsparse"]
    assert list(record) == ["failure"]
    assert re.match(f"wrong answer.*{message}", record["failure"])


def test_a_wrong_answer_fails_the_run(monkeypatch, small, capsys):
    monkeypatch.setattr(fastsparse, "sddmm", lambda x, weight, indices: x.new_zeros(indices.shape))
    assert command.main(["sddmm", "--quick"]) == 1
    assert "wrong answer" in capsys.readouterr().err


def test_a_call_that_fails_is_a_bar_without_a_figure(monkeypatch):
    def broken(*arguments, **options):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(fastsparse, "topk_encode", broken)
    trial = Lab.open("cuda", quick=True, known=KNOWN)
    job = jobs_of(trial, ["topk_encode"])[0]
    bars = job.bars(job.case(trial))
    assert [bar.verdict for bar in bars] == ["not measured"] * 3
    assert all("none left" in bar.note for bar in bars)


def test_what_does_not_fit_is_skipped_with_the_reason(monkeypatch, small):
    monkeypatch.setattr(lab, "short_of_memory", lambda need: "needs 9 GiB")
    for bench in results.BENCHES:
        for job in jobs_of(TRIAL, [bench]):
            case = job.case(TRIAL)
            assert case["skipped"] == "needs 9 GiB"
            assert all(bar.note == "needs 9 GiB" or bar.measured is None for bar in job.bars(case))


def test_memory_sees_what_torch_allocates():
    shape = Shape("matrix", 1024, 16, 16384, 4)
    record = bench_memory._measure("encode", "torch", shape, 0)
    assert record["median"] > 0.9 * 4 * shape.N * shape.M, record  # one N x M matrix at the very least


@pytest.mark.parametrize(("extra", "passed"), [(0, True), (1600, False)])
def test_what_more_steps_take_is_held_against_what_they_give(monkeypatch, extra, passed):
    shape = Shape("step", 8, 16, 200, 4)
    kept = 12 * shape.N  # bytes of the outputs for each step: nothing else may grow with k

    def bar(measure):
        monkeypatch.setattr(bench_memory, "_measure", lambda work, who, shape, need: measure(shape.k))
        first, last = bench_memory.pursuits_at_more_steps(shape)
        assert (first.given.shape.k, last.given.shape.k) == (4, 16)
        (found,) = last.bars(last.case(TRIAL))
        return found

    assert bar(lambda k: {"median": 1e5 + (kept + extra) * k, "unit": "bytes"}).passed is passed
    died = bar(lambda k: {"failure": "died"})
    assert (died.measured, died.note) == (None, "fastsparse: died")


@pytest.mark.parametrize(("ours", "passed"), [(3.4e9, True), (3.6e9, False)])
def test_a_librarys_step_is_held_against_itself(monkeypatch, ours, passed):
    peaks = {"fastsparse": ours, "fastsparse, relayout_": 1e9, "as it is": 1e10}
    monkeypatch.setattr(
        bench_memory, "_measure", lambda work, who, *_: {"median": peaks[who], "unit": "bytes"}
    )
    trial = replace(TRIAL, peers=True)
    jobs = jobs_of(trial, ["memory"])
    assert len(jobs) == 3
    for job in jobs:
        case = job.case(trial)
        assert [bar.passed for bar in job.bars(case)] == [passed]
        assert case["ratios"]["fastsparse"] == {"as it is": {"of_medians": 1e10 / ours}}
        del case["contenders"]["as it is"]
        assert [bar.note for bar in job.bars(case)] == ["as it is: not run"]


def sae_step():
    """Everyone's step, parameters, tokens, and the right answers."""
    parameters, x = steps.problem(replace(SMALL, N=32))
    kinds = steps.FastsparseStep, steps.DenseStep
    return kinds, parameters, x, steps.DenseStep(parameters, SMALL.k).run(x).found()


def pursuit_step():
    parameters, x, oracle = pursuits.problem(replace(SMALL, N=32))
    assert oracle.clear.all()
    kinds = (partial(pursuits.ResidualStep, encode) for encode in (pursuits.encode, pursuits.torch_loop))
    return kinds, parameters, x, pursuits.expected_gradients(oracle)


@pytest.mark.parametrize("problem", [sae_step, pursuit_step])
def test_a_step_and_its_gradients_are_compared(problem):
    kinds, parameters, x, expected = problem()
    assert x.shape == (32, SMALL.D)
    for kind in kinds:
        step = kind(parameters, SMALL.k)
        assert "d_b_dec" in steps.check(expected, 1e-4, step.run(x))
        before = step.leaves["b_dec"]._version
        steps.check(expected, 1e-4, step.run(x))  # gradients don't pile up
        assert step.leaves["b_dec"]._version > before  # as after an optimiser's step
        other = kind({**parameters, "b_dec": parameters["b_dec"] + 0.1}, SMALL.k)
        with pytest.raises(WrongAnswer):
            steps.check(expected, 1e-4, other.run(x))


@pytest.mark.parametrize("peer", ["dictionary_learning", "overcomplete", "sae_lens", "sparsify"])
def test_a_peers_steps_lack_nothing(peer):
    """Whose packages need not be here: their classes say what an instance would be refused for."""
    module = importlib.import_module(f"benchmarks.peers.{peer}")
    classes = [kind for name, kind in vars(module).items() if name.endswith("Step") and name[0] != "_"]
    own = [kind for kind in classes if kind.__module__ == module.__name__]
    assert own
    assert not any(inspect.isabstract(kind) for kind in own)


def test_a_peers_parameters_take_our_values():
    class Turned(steps.PeerStep):
        transposed = "W_dec"

        def loss(self, x):
            p = self.leaves
            return steps.dense_loss(x, p["W_enc"], p["b_enc"], p["W_dec"].T, p["b_dec"], SMALL.k)

    _, parameters, x, expected = sae_step()
    own = torch.nn.Parameter(torch.zeros(SMALL.D, SMALL.M))
    leaves = {name: torch.nn.Parameter(torch.zeros_like(value)) for name, value in parameters.items()}
    step = Turned(torch.nn.Module(), leaves | {"W_dec": own}, parameters)
    steps.check(expected, 1e-4, step.run(x))
    assert own.shape == own.grad.shape == (SMALL.D, SMALL.M)


def test_a_new_dictionary_is_another_and_the_same_to_rounding():
    before = data.dictionary(SMALL, "gaussian")
    after = before.clone().requires_grad_()
    seen = set()
    for _ in range(5):
        pursuits.renew(after)
        seen.add(after.detach().numpy().tobytes())
    assert len(seen) == 5
    torch.testing.assert_close(after.detach(), before, rtol=6e-7, atol=0)


@pytest.mark.parametrize("cell", [GRU, LSTM], ids=lambda cell: cell.name)
def test_errors_count_where_rounding_is_not_amplified(cell, monkeypatch):
    solved = type(cell).solved

    def cases(wrong):
        bench_gated_recurrence._errors.cache_clear()
        monkeypatch.setattr(type(cell), "solved", wrong)
        jobs = [bench_gated_recurrence._error_job(cell, s, 600) for s in bench_gated_recurrence.SCALES]
        found = [(case := job.case(TRIAL), job.bars(case)) for job in jobs]
        bench_gated_recurrence._errors.cache_clear()
        return found

    def times(factor, *solvers):
        def wrong(self, u, weights, solver):
            found, passes = solved(self, u, weights, solver)
            return tuple(part * factor for part in found) if solver in solvers else found, passes

        return wrong

    fine = cases(solved)
    counts = [case["channels_that_count"] for case, _ in fine]
    assert counts[:4] == [bench_gated_recurrence.CHANNELS] * 4
    assert 0 < counts[-1] < bench_gated_recurrence.CHANNELS  # the others are chaotic
    assert fine[-1][0]["contenders"]["torch loop"]["of_the_rest"] > 1e-4  # there a plain loop is lost too
    assert all(case["contenders"]["fastsparse, sequential"]["redone"] == 0 for case, _ in fine)
    assert all(bar.passed for _, bars in fine for bar in bars)
    assert not any(bar.passed for _, bars in cases(times(1 + 1e-4, "newton")) for bar in bars)
    assert [bar.measured for _, bars in cases(times(torch.nan, *SOLVERS)) for bar in bars] == [None] * len(
        fine
    )


@pytest.mark.parametrize("cell", [GRU, LSTM], ids=lambda cell: cell.name)
def test_a_layers_gradients_are_compared(cell):
    layer = Layer(cell, Sequences("layer", 2, 15, 6))
    expected = layer.expected()
    for found in (layer.ours(), layer.loop()):
        assert "d_weight_hh_l0" in close_all(expected, 1e-4, found)
    for place, name in enumerate(expected):
        found = layer.ours()
        found[place] = found[place] * 1.01
        with pytest.raises(WrongAnswer, match=name):
            close_all(expected, 1e-4, found)


def test_who_is_slow_is_left_out_at_greater_lengths(monkeypatch, small):
    monkeypatch.setattr(bench_recurrence_length, "SLOW", 0.0)
    jobs = jobs_of(TRIAL, ["recurrence_length"])
    first, second = (job.case(TRIAL) for job in jobs if job.facts["series"] == "H=8, forward")
    assert len(first["contenders"]) == 5
    assert second["skipped"].startswith("all were too slow")


@pytest.mark.parametrize("kind", shapes.KINDS)
def test_data_is_seeded_and_what_it_says(kind):
    shape = Shape("data", 300, 32, 2000, 8)
    for make in (data.tokens, data.dictionary):
        torch.testing.assert_close(make(shape, kind), make(shape, kind), rtol=0, atol=0)
    weight = data.dictionary(shape, kind)
    torch.testing.assert_close(torch.linalg.vector_norm(weight, dim=1), torch.ones(2000))
    values, indices = data.code(shape, kind)
    assert (values >= 0).all()
    assert indices.min() >= 0
    assert indices.max() < shape.M
    counts = torch.bincount(indices.flatten(), minlength=shape.M)
    share = counts.sort(descending=True).values[:20].sum() / counts.sum()
    x = data.tokens(shape, kind)
    largest = x.abs().mean(0).max() / x.abs().mean(0).median()
    if kind == "correlated":
        assert share > 0.25  # the most popular hundredth of the latents
        assert largest > 10  # outlier dimensions
    else:
        assert share < 0.1
        assert largest < 2


def test_normal_is_normal_whatever_the_number_of_threads(monkeypatch):
    first = data.normal(1000, 50, 3)
    assert abs(float(first.mean())) < 0.02
    assert abs(float(first.std()) - 1) < 0.02
    monkeypatch.setattr(data, "BLOCK", 1000)
    blocks = data.normal(1000, 50, 3)
    monkeypatch.setattr(data.os, "cpu_count", lambda: 1)
    assert torch.equal(data.normal(1000, 50, 3), blocks)


def test_every_shape_of_the_bars_is_there():
    names = [shape.name for shape in shapes.HEADLINE + shapes.FEW_TOKENS + shapes.TRAINING]
    assert len(set(names)) == len(names)
    sizes = {(s.N, s.D, s.M, s.k): s for s in shapes.HEADLINE}
    assert sizes[1024, 768, 16384, 32].speedup == 2.5
    assert sizes[4096, 384, 6144, 16].speedup == sizes[512, 2048, 32768, 64].speedup == 2.0
    assert all(shape.speedup == 1.2 for shape in shapes.TRAINING)
