"""Choosing a backend: what is said about each, and that a named one is used or refused, never swapped."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from backends import host_backend_names
from oracle import random

import fastsparse
from fastsparse.backend import CPU_LEVELS, NAMES, _cpu, use_cpu_level

compiled = pytest.mark.skipif(
    not fastsparse.backends()["cpu"].available, reason="the CPU kernels were not built"
)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """A fresh interpreter with more environment variables."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_backend_is_described():
    described = fastsparse.backends()
    assert tuple(described) == NAMES
    assert described["reference"].available
    for name, backend in described.items():
        assert backend.name == name
        assert backend.detail
        assert str(backend).startswith(f"{name}: {'available' if backend.available else 'unavailable'} (")


@pytest.mark.parametrize("bad", ["gpu", "", "CPU", None])
def test_unknown_name(bad):
    with (
        pytest.raises(
            ValueError, match=r"^use_backend: backend must be one of reference, cpu, triton, cuda, got"
        ) as caught,
        fastsparse.use_backend(bad),
    ):
        pass
    assert repr(bad) in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_an_unavailable_backend_is_refused_with_the_reason(name):
    backend = fastsparse.backends()[name]
    if backend.available:
        with fastsparse.use_backend(name):
            return
    with pytest.raises(RuntimeError) as caught, fastsparse.use_backend(name):
        pass
    assert repr(name) in str(caught.value)
    assert backend.detail in str(caught.value)


def test_choices_nest_and_end_with_their_block():
    x = random(3, 4, seed=1)
    names = [name for name, backend in fastsparse.backends().items() if backend.available]
    for outer in names:
        for inner in names:
            with fastsparse.use_backend(outer):
                with fastsparse.use_backend(inner):
                    assert requested() == inner
                assert requested() == outer
                with pytest.raises(KeyError), fastsparse.use_backend(inner):
                    raise KeyError
                assert requested() == outer
                fastsparse.topk_encode(x, x, k=1)
    assert requested() is None


def requested() -> str | None:
    return sys.modules["fastsparse.backend"]._requested


@compiled
def test_a_choice_holds_in_other_threads():
    seen = []
    with fastsparse.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(requested()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_the_reference_is_what_runs(monkeypatch):
    calls = []
    real = fastsparse.reference.topk_encode
    monkeypatch.setattr(fastsparse.reference, "topk_encode", lambda *args: calls.append(1) or real(*args))
    x = random(3, 4, seed=1)
    with fastsparse.use_backend("reference"):
        fastsparse.topk_encode(x, x, k=1)
    assert calls == [1]
    if fastsparse.backends()["cpu"].available:
        fastsparse.topk_encode(x, x, k=1)
        assert calls == [1], "the compiled kernel is there, and the reference ran"


@compiled
def test_the_cpu_backend_refuses_tensors_elsewhere():
    with (
        fastsparse.use_backend("cpu"),
        pytest.raises(RuntimeError, match=r"'cpu' was asked for .* got one on meta"),
    ):
        fastsparse.ops.spmm(*(torch.ones(1, 1, device="meta") for _ in range(3)))


@compiled
def test_levels():
    best = CPU_LEVELS.index(_cpu.best_level)
    before = _cpu.level
    for number, level in enumerate(CPU_LEVELS):
        if number <= best:
            with use_cpu_level(level):
                assert _cpu.level == level
                assert level in fastsparse.backends()["cpu"].detail
        else:
            with (
                pytest.raises(RuntimeError, match=f"{level} .* up to {_cpu.best_level}"),
                use_cpu_level(level),
            ):
                pass
        assert _cpu.level == before
    for bad in ("sse", "", "AVX2"):
        with pytest.raises(ValueError, match="baseline, avx2, avx512, got") as caught, use_cpu_level(bad):
            pass
        assert repr(bad) in str(caught.value)


@compiled
def test_the_environment_chooses_level_and_backend():
    show = "from fastsparse.backend import _requested, backends; print(backends()['cpu'], _requested)"
    done = python(show, FASTSPARSE_CPU_LEVEL="baseline", FASTSPARSE_BACKEND="cpu")
    assert done.returncode == 0, done.stderr
    assert "level baseline" in done.stdout
    assert done.stdout.endswith("cpu\n")
    done = python(show, FASTSPARSE_CPU_LEVEL="sse9")
    assert done.returncode == 1
    assert (
        "ValueError: FASTSPARSE_CPU_LEVEL: must be one of baseline, avx2, avx512, got 'sse9'" in done.stderr
    )


def test_the_environment_is_checked():
    done = python("import fastsparse", FASTSPARSE_BACKEND="tpu")
    assert done.returncode == 1
    assert (
        "ValueError: FASTSPARSE_BACKEND: backend must be one of reference, cpu, triton, cuda, got 'tpu'"
        in done.stderr
    )


def test_an_unavailable_backend_named_by_the_environment_is_refused_when_used():
    done = python(
        "import torch, fastsparse; fastsparse.topk_encode(torch.eye(2), torch.eye(2), k=1)",
        FASTSPARSE_BACKEND="triton",
    )
    assert done.returncode == 1
    assert "RuntimeError: backend 'triton' was asked for and can't run here: " in done.stderr


@compiled
def test_levels_agree_on_exact_scores():
    x, weight = random(50, 40, seed=1).round(), random(3000, 40, seed=2).round()
    codes = []
    for name in host_backend_names()[1:]:
        with use_cpu_level(name.split("-")[1]):
            codes.append(fastsparse.topk_encode(x, weight, k=20))
    for code in codes[1:]:
        assert torch.equal(code.indices, codes[0].indices)
        assert torch.equal(code.values, codes[0].values)
