"""The benches themselves, at shapes so small that their figures mean nothing."""

from dataclasses import replace

import pytest
import torch

import fastsparse
from benchmarks import __main__ as command
from benchmarks import bench_memory, data, pursuits, results, shapes, steps
from benchmarks.harness import WrongAnswer
from benchmarks.shapes import Shape

SMALL = Shape("small", 8, 16, 64, 4, correlated=True)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    # Without headline shapes, nor the compiler: it takes ten seconds on each.
    monkeypatch.setattr(shapes, "ALL", (SMALL,))
    monkeypatch.setattr(shapes, "MEMORY", SMALL)
    for name in ("PURSUIT", "WIDE_PURSUIT", "LONG_PURSUIT", "PURSUIT_STEP"):
        monkeypatch.setattr(shapes, name, replace(getattr(shapes, name), N=8, D=16, M=200, k=4))
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
