"""The benches themselves, at shapes so small that their figures mean nothing."""

from dataclasses import replace

import pytest
import torch

import fastsparse
from benchmarks import __main__ as command
from benchmarks import (
    bench_memory,
    bench_recurrence_length,
    data,
    gated_recurrences,
    plots,
    pursuits,
    results,
    shapes,
    steps,
)
from benchmarks.cases import Options
from benchmarks.harness import WrongAnswer
from benchmarks.recurrences import GRU, LSTM, Layer
from benchmarks.shapes import Sequences, Shape

SMALL = Shape("small", 8, 16, 64, 4, correlated=True)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    # Without headline shapes, nor the compiler: it takes ten seconds on each.
    monkeypatch.setattr(shapes, "ALL", (SMALL,))
    monkeypatch.setattr(shapes, "MEMORY", SMALL)
    for name in ("PURSUIT", "WIDE_PURSUIT", "LONG_PURSUIT", "PURSUIT_STEP"):
        monkeypatch.setattr(shapes, name, replace(getattr(shapes, name), N=8, D=16, M=200, k=4))
    monkeypatch.setattr(shapes, "RECURRENCE", Sequences("layer", 2, 20, 5, headline=True))
    monkeypatch.setattr(shapes, "LONG_RECURRENCES", (Sequences("many steps", 1, 40, 3),))
    monkeypatch.setattr(gated_recurrences, "STEPS", (8, 33))
    monkeypatch.setattr(bench_recurrence_length, "LENGTHS", (5, 9))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def test_topk_encode_and_sparse_decode_are_measured_and_written(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert command.main(["topk_encode", "sparse_decode", "--quick", "--output", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    encode, decode = (results.read(folder / f"{name}.json") for name in ("topk_encode", "sparse_decode"))
    assert [case["name"] for case in encode["cases"]] == ["small, gaussian", "small, correlated"]
    assert len(decode["cases"]) == 4  # both directions on both kinds of data
    for case in encode["cases"] + decode["cases"]:
        for name in ("fastsparse", "torch"):
            record = case["contenders"][name]
            assert record["check"]
            assert 0 < record["q1"] <= record["median"] <= record["q3"]
            assert record["roofline"]["bytes"] > 0
        assert case["ratios"]["fastsparse"]["torch"]["of_medians"] > 0
    assert {"product fp32", "product bf16"} <= encode["cases"][0]["contenders"].keys()
    assert len(encode["bars"]) == 4
    assert (folder / "topk_encode.svg").exists()
    assert "bars" in capsys.readouterr().out


def test_a_wrong_kernel_gets_no_figure_and_fails_the_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    right = fastsparse.topk_encode

    def wrong(x, weight, bias, *, k):
        values, indices = right(x, weight, bias, k=k)
        return values, (indices + 1) % len(weight)

    monkeypatch.setattr(fastsparse, "topk_encode", wrong)
    assert command.main(["topk_encode", "--quick", "--output", str(tmp_path)]) == 1
    result = results.read(next(tmp_path.glob("*/topk_encode.json")))
    record = result["cases"][0]["contenders"]["fastsparse"]
    assert list(record) == ["failure"]
    assert not any(bar["passed"] for bar in result["bars"])
    assert "wrong answer" in capsys.readouterr().err


def test_dispatch_and_memory_print(monkeypatch, capsys):
    measure = bench_memory._measure
    torchs = {"median": 1e9, "unit": "bytes"}  # spares a process each
    monkeypatch.setattr(
        bench_memory,
        "_measure",
        lambda work, who, *rest: torchs if who == "torch" else measure(work, who, *rest),
    )
    assert command.main(["dispatch", "memory", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "dispatch, sparse_decode: beyond the bare op" in out
    assert "peak growth over N x M in fp32" in out
    assert "matching_pursuit forward + backward" in out
    assert "not measured" not in out


def test_memory_sees_what_torch_allocates():
    shape = Shape("matrix", 1024, 16, 16384, 4)
    record = bench_memory._measure("encode", "torch", shape, 0)
    assert record["median"] > 0.9 * 4 * shape.N * shape.M, record  # one N x M matrix at the very least


@pytest.mark.parametrize(("extra", "passed"), [(0, True), (1600, False)])
def test_what_more_steps_take_is_held_against_what_they_give(monkeypatch, extra, passed):
    shape = Shape("step", 8, 16, 200, 4)
    kept = 12 * shape.N  # bytes of the outputs for each step: nothing else may grow with k

    def measured(work, who, shape, need):
        return {"median": 1e5 + (kept + extra) * shape.k, "unit": "bytes", "check": "right"}

    monkeypatch.setattr(bench_memory, "_measure", measured)
    (first, _), (last, (bar,)) = bench_memory._pursuit(shape)
    assert (first["shape"]["k"], last["shape"]["k"]) == (4, 16)
    assert bar.passed is passed
    monkeypatch.setattr(bench_memory, "_measure", lambda *arguments: {"failure": "died"})
    ((_, _), (_, (bar,))) = bench_memory._pursuit(shape)
    assert (bar.measured, bar.note) == (None, "died")


def test_a_step_and_its_gradients_are_compared():
    shape = Shape("step", 32, 16, 64, 4)
    parameters, x = steps.problem(shape, "gaussian")
    assert x.shape == (32, 16)
    expected = steps.ReferenceStep(parameters, shape.k).run(x)
    from benchmarks.bench_sae_step import _check

    for kind in (steps.FastsparseStep, steps.DenseStep):
        step = kind(parameters, shape.k)
        assert "d_W_dec" in _check(expected, step.run(x))
        before = step.leaves["W_enc"]._version
        _check(expected, step.run(x))  # gradients don't pile up
        assert step.leaves["W_enc"]._version > before  # as after an optimiser's step
    other = steps.DenseStep(replace(parameters, b_dec=parameters.b_dec + 0.1), shape.k)
    with pytest.raises(WrongAnswer):
        _check(expected, other.run(x))


def test_matching_pursuit_is_measured_and_written(tmp_path):
    pytest.importorskip("matplotlib")
    assert command.main(["matching_pursuit", "--quick", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/matching_pursuit.json")
    result = results.read(path)
    cases = {case["name"]: case for case in result["cases"]}
    assert list(cases) == [
        "small, gaussian, kept dictionary", "small, gaussian, new dictionary",
        "small, correlated, kept dictionary", "small, correlated, new dictionary",
        "wide, gaussian, new dictionary", "long, gaussian", "MP-SAE step",
    ]  # fmt: skip
    for case in cases.values():
        assert all("median" in record for record in case["contenders"].values()), case
    assert cases["wide, gaussian, new dictionary"]["contenders"]["torch"]["share"] == 0.25
    gram = cases["small, gaussian, kept dictionary"]["ratios"]["fastsparse"]["torch, Gram matrix"]
    assert gram["of_medians"] > 0
    energy, choices = result["bars"][-2:]
    assert energy["passed"]
    assert choices["measured"] == 0


def test_a_pursuit_that_is_off_by_a_hundredth_gets_no_figure(monkeypatch, capsys):
    right = fastsparse.matching_pursuit

    def wrong(x, dictionary, **options):
        values, indices, residual = right(x, dictionary, **options)
        return fastsparse.Pursuit(values * 1.01, indices, residual)

    monkeypatch.setattr(fastsparse, "matching_pursuit", wrong)
    assert command.main(["matching_pursuit", "--quick"]) == 1
    assert "a value is not its atom's" in capsys.readouterr().err


def test_a_new_dictionary_is_another_and_the_same_to_rounding():
    before = data.dictionary(SMALL, "gaussian")
    after = before.clone().requires_grad_()
    seen = set()
    for _ in range(5):
        pursuits.renew(after)
        seen.add(after.detach().numpy().tobytes())
    assert len(seen) == 5
    torch.testing.assert_close(after.detach(), before, rtol=6e-7, atol=0)


def test_a_pursuits_step_and_its_gradients_are_compared():
    x, dictionary, b_dec, oracle = pursuits.problem(replace(SMALL, N=32))
    assert x.shape == (32, SMALL.D)
    assert oracle.clear.all()
    expected = pursuits.expected_gradients(oracle)
    from benchmarks.bench_matching_pursuit import _check_step

    for kind in (pursuits.FastsparsePursuitStep, pursuits.TorchPursuitStep):
        step = kind(dictionary, b_dec, SMALL.k)
        assert "d_b_dec" in _check_step(*expected, step.run(x))
        _check_step(*expected, step.run(x))  # gradients don't pile up
    other = pursuits.TorchPursuitStep(dictionary, b_dec + 0.01, SMALL.k)
    with pytest.raises(WrongAnswer):
        _check_step(*expected, other.run(x))


@pytest.mark.parametrize("name", ["linear_recurrence", "gru_recurrence", "lstm_recurrence"])
def test_recurrences_are_measured_and_written(name, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert command.main([name, "--quick", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob(f"*/{name}.json")
    result = results.read(path)
    for case in result["cases"]:
        assert case["backend"] in ("cpu", "reference")
        assert all("failure" not in record for record in case["contenders"].values()), case
        assert all(record["check"] for record in case["contenders"].values())
    forward, *_, last = result["cases"]
    assert forward["shape"] == {"B": 2, "T": 20, "H": 5}
    assert {"fastsparse", "copy", "torch loop"} <= forward["contenders"].keys()
    assert forward["ratios"]["fastsparse"]["copy"]["of_medians"] > 0
    assert "(backend " in capsys.readouterr().out
    bars = {bar["name"]: bar for bar in result["bars"]}
    if name == "linear_recurrence":
        assert len(bars) == 3
        return
    assert {"torch.compile", "fastsparse, newton", "fastsparse, shooting"} <= forward["contenders"].keys()
    assert last["name"] == "error, weights of scale 4, T=33"
    errors = [bar for name, bar in bars.items() if "error" in name]
    assert len(errors) == 2 * len(gated_recurrences.SCALES)
    assert all(bar["passed"] for bar in errors)


@pytest.mark.parametrize("name", ["gru_recurrence", "linear_recurrence"])
def test_a_recurrence_that_is_off_gets_no_figure(name, monkeypatch, capsys):
    right = getattr(fastsparse, name)

    def wrong(*inputs, **options):
        found = right(*inputs, **options)
        return (found[0] * 1.0001, *found[1:]) if isinstance(found, tuple) else found * 1.0001

    monkeypatch.setattr(fastsparse, name, wrong)
    assert command.main([name, "--quick"]) == 1
    said = capsys.readouterr()
    assert "layer, forward: fastsparse: wrong answer: h: relative error 0.0001" in said.err.replace(
        ", single channels", ""
    )


@pytest.mark.parametrize("cell", [GRU, LSTM], ids=lambda cell: cell.name)
def test_errors_count_where_rounding_is_not_amplified(cell, monkeypatch):
    monkeypatch.setattr(gated_recurrences, "STEPS", (600,))
    solved = type(cell).solved

    def cases(wrong):
        monkeypatch.setattr(type(cell), "solved", wrong)
        return list(gated_recurrences._errors(cell, Options()))

    def off(self, u, weights, solver):
        found, passes = solved(self, u, weights, solver)
        return tuple(part * (1 + 1e-4) for part in found) if solver == "newton" else found, passes

    def lost(self, u, weights, solver):
        found, passes = solved(self, u, weights, solver)
        return tuple(part * torch.nan for part in found), passes

    fine = cases(solved)
    counts = [case["channels_that_count"] for case, _ in fine]
    assert counts[:4] == [gated_recurrences.CHANNELS] * 4
    assert 0 < counts[-1] < gated_recurrences.CHANNELS  # the others are chaotic
    assert fine[-1][0]["contenders"]["torch loop"]["of_the_rest"] > 1e-4  # there a plain loop is lost too
    assert all(case["contenders"]["fastsparse, sequential"]["redone"] == 0 for case, _ in fine)
    assert all(bar.passed for _, bars in fine for bar in bars)
    assert not any(bar.passed for _, bars in cases(off) for bar in bars)
    assert [bar.measured for _, bars in cases(lost) for bar in bars] == [None] * len(fine)


@pytest.mark.parametrize("cell", [GRU, LSTM], ids=lambda cell: cell.name)
def test_a_layers_gradients_are_compared(cell):
    layer = Layer(cell, Sequences("layer", 2, 15, 6))
    expected = layer.expected()
    for found in (layer.ours(), layer.loop()):
        assert "d_weight_hh_l0" in layer.check(expected, 1e-4, found)
    for wrong in range(len(expected)):
        found = layer.ours()
        found[wrong] = found[wrong] * 1.01
        with pytest.raises(WrongAnswer, match=list(expected)[wrong]):
            layer.check(expected, 1e-4, found)


def test_time_is_drawn_over_steps(tmp_path):
    pytest.importorskip("matplotlib")
    assert command.main(["recurrence_length", "--quick", "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/recurrence_length.json")
    result = results.read(path)
    assert len(result["cases"]) == 8  # two lengths, two widths, forward and both directions
    for case in result["cases"]:
        solvers = (f"fastsparse, {solver}" for solver in ("sequential", "newton", "shooting"))
        assert case["contenders"].keys() == {"torch loop", "fastsparse", *solvers}
        assert all("median" in record for record in case["contenders"].values()), case
    drawn = path.with_suffix(".svg").read_bytes()
    assert plots.draw(result, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == drawn


def test_who_is_slow_is_left_out_at_greater_lengths(monkeypatch):
    monkeypatch.setattr(bench_recurrence_length, "SLOW", 0.0)
    first, second = (
        case["contenders"]
        for case, _ in bench_recurrence_length.run(Options(quick=True))
        if case["series"] == "H=8, forward"
    )
    assert len(first) == 5
    assert not second


def test_what_does_not_fit_is_skipped_with_the_reason(monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.bench_topk_encode.short_of_memory", lambda need: "needs 9 GiB")
    assert command.main(["topk_encode", "--quick"]) == 0
    out = capsys.readouterr().out
    assert "skipped: needs 9 GiB" in out
    assert "not measured" in out


@pytest.mark.parametrize("kind", data.KINDS)
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "bench must be among topk_encode"),
        (["--threads", "0"], "at least 1"),
        (["--seconds", "0"], "above 0"),
        (["--seconds", "nan"], "above 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.parse(arguments)
    assert message in capsys.readouterr().err


def test_every_shape_of_the_bars_is_there():
    names = [shape.name for shape in shapes.HEADLINE + shapes.FEW_TOKENS + shapes.TRAINING]
    assert len(set(names)) == len(names)
    sizes = {(s.N, s.D, s.M, s.k): s for s in shapes.HEADLINE}
    assert sizes[1024, 768, 16384, 32].speedup == 2.5
    assert sizes[4096, 384, 6144, 16].speedup == sizes[512, 2048, 32768, 64].speedup == 2.0
    assert all(shape.speedup == 1.2 for shape in shapes.TRAINING)
