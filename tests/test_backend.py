"""Choosing a backend: what is said about each, and that a named one is used or refused, never swapped."""

import asyncio
import os
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from backends import host_backend_names
from oracle import random
from test_sparse_products import SDDMM, SPMM_T

import fastsparse
from fastsparse import backend as backend_module
from fastsparse.backend import CPU_LEVELS, GPU_NAMES, NAMES, _cpu, _CudaLibrary, use_cpu_level
from fastsparse.ops._library import Op

compiled = pytest.mark.skipif(
    not fastsparse.backends()["cpu"].available, reason="the CPU kernels were not built"
)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """A fresh interpreter with more environment variables."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


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
    message = f"^use_backend: backend must be one of reference, cpu, triton, cuda, got {bad!r}$"
    with pytest.raises(ValueError, match=message), fastsparse.use_backend(bad):
        pass


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


SETTINGS = {
    "use_backend": (fastsparse.use_backend, ("reference", "cpu"), lambda: requested()),
    "use_cpu_level": (use_cpu_level, ("baseline", "avx2"), lambda: _cpu.level),
}
two_levels = pytest.mark.skipif(len(host_backend_names()) < 3, reason="there is no second level")
overlapping = pytest.mark.parametrize(
    "setting", ["use_backend", pytest.param("use_cpu_level", marks=two_levels)]
)


@compiled
@overlapping
def test_blocks_of_threads_overlap_or_are_refused(setting):
    use, (choice, other), now = SETTINGS[setting]
    outside = now()
    entered, leave, errors = threading.Event(), threading.Event(), []

    def second():
        try:
            with use(other):
                pass
        except RuntimeError as error:
            errors.append(str(error))
        with use(choice):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=second, daemon=True)
    with use(choice):
        thread.start()
        entered.wait()
        with pytest.raises(RuntimeError, match="another thread or task"), use(other):
            pass
        assert now() == choice
    assert now() == choice, "the second block still lasts"
    leave.set()
    thread.join()
    assert now() == outside
    (error,) = errors
    assert error == (
        f"{setting}: {other!r} can't be chosen while a block of another thread or task lasts that chose "
        f"{choice!r}: the choice holds for the whole process"
    )


@compiled
@overlapping
def test_blocks_of_tasks_and_generators_overlap(setting):
    use, (choice, other), now = SETTINGS[setting]
    outside = now()

    async def task(name, ready, wait):
        with use(name):
            ready.set()
            await wait.wait()
            assert now() == name

    async def run():
        ready, first, second, over = (asyncio.Event() for _ in range(4))
        over.set()
        tasks = [asyncio.create_task(task(choice, ready, wait)) for wait in (first, second)]
        await ready.wait()
        with pytest.raises(RuntimeError, match="another thread or task"):
            await asyncio.create_task(task(other, ready, over))
        # The first to enter is the first to leave.
        for wait, ends in zip((first, second), tasks, strict=True):
            wait.set()
            await ends

    asyncio.run(run())
    assert now() == outside

    def generator():
        with use(choice):
            yield

    suspended = generator()
    next(suspended)
    with use(other):
        suspended.close()  # which ends the outer block first
        assert now() == other
    assert now() == outside


def defined(monkeypatch) -> list[str]:
    """The ops whose references ran, from now on."""
    calls, real = [], Op.define
    monkeypatch.setattr(Op, "define", lambda op, *arguments: calls.append(op.name) or real(op, *arguments))
    return calls


@compiled
def test_gradients_are_taken_on_the_backend_of_their_block(monkeypatch):
    calls = defined(monkeypatch)
    values, weight = random(3, 2, seed=1).requires_grad_(), random(5, 4, seed=2).requires_grad_()
    indices = torch.tensor([[0, 1], [2, 3], [4, 0]])
    out = fastsparse.spmm(values, indices, weight).sum()
    with fastsparse.use_backend("reference"):
        out.backward()
    assert calls == [SDDMM.name, SPMM_T.name]


def requested() -> str | None:
    return sys.modules["fastsparse.backend"]._requested


def test_the_reference_is_what_runs(monkeypatch):
    calls = defined(monkeypatch)
    x = random(3, 4, seed=1)
    with fastsparse.use_backend("reference"):
        fastsparse.topk_encode(x, x, k=1)
    assert calls == ["topk_encode"]
    if fastsparse.backends()["cpu"].available:
        fastsparse.topk_encode(x, x, k=1)
        assert calls == ["topk_encode"], "the compiled kernel is there, and the reference ran"


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
        with pytest.raises(ValueError, match=f"baseline, avx2, avx512, got {bad!r}"), use_cpu_level(bad):
            pass


@compiled
def test_the_environment_chooses_level_and_backend():
    show = "from fastsparse.backend import _requested, backends; print(backends()['cpu'], _requested)"
    done = python(show, FASTSPARSE_CPU_LEVEL="baseline", FASTSPARSE_BACKEND="cpu")
    assert done.returncode == 0, done.stderr
    assert "level baseline" in done.stdout
    assert done.stdout.endswith("cpu\n")


ENCODE = "import torch, fastsparse; fastsparse.topk_encode(torch.eye(2), torch.eye(2), k=1)"
ONE_OF_NAMES = "ValueError: FASTSPARSE_BACKEND: backend must be one of reference, cpu, triton, cuda, got"
ONE_OF_LEVELS = "ValueError: FASTSPARSE_CPU_LEVEL: must be one of baseline, avx2, avx512, got"


@pytest.mark.parametrize(
    ("name", "value", "code", "message"),
    [
        ("FASTSPARSE_BACKEND", "tpu", "import fastsparse", f"{ONE_OF_NAMES} 'tpu'"),
        (
            "FASTSPARSE_BACKEND",
            "triton",
            ENCODE,
            "RuntimeError: backend 'triton' was asked for and can't run",
        ),
        pytest.param(
            "FASTSPARSE_CPU_LEVEL", "sse9", "import fastsparse", f"{ONE_OF_LEVELS} 'sse9'", marks=compiled
        ),
    ],
)
def test_what_the_environment_names_is_checked(name, value, code, message):
    done = python(code, **{name: value})
    assert done.returncode == 1
    assert message in done.stderr


# What is said of GPUs, on machines that have none.


class FakeCudaLibrary(_CudaLibrary):
    """A library that loads and holds what it is told."""

    failure, contents = None, "sm_80 sm_90 compute_90"

    def __init__(self):
        super().__init__(Path("_ops_cuda.so"))


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that there are GPUs of some compute capabilities, a PyTorch for them, a library and Triton."""

    def pretend(*capabilities: tuple[int, int], hip: str | None = None) -> None:
        devices = [
            types.SimpleNamespace(name=f"GPU {i}", major=major, minor=minor)
            for i, (major, minor) in enumerate(capabilities)
        ]
        monkeypatch.setattr(torch.version, "cuda", None if hip else "13.0")
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(devices))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: devices[index])
        monkeypatch.setattr(backend_module, "_cuda", FakeCudaLibrary())
        module = types.SimpleNamespace(__version__="3.6.0")
        monkeypatch.setattr(backend_module, "import_triton", lambda: module)
        forget()

    def forget():
        backend_module.device_failure.cache_clear()
        backend_module._triton_failure.cache_clear()

    yield pretend
    forget()


def test_gpu_backends_are_described(gpus):
    gpus((9, 0))
    assert str(fastsparse.backends()["cuda"]) == "cuda: available (CUDA C++, sm_80 sm_90 compute_90)"
    assert str(fastsparse.backends()["triton"]) == "triton: available (Triton 3.6.0)"
    for name in GPU_NAMES:
        with fastsparse.use_backend(name):
            assert requested() == name
            with pytest.raises(
                RuntimeError, match=f"'{name}' was asked for and runs on cuda tensors, got one on cpu"
            ):
                fastsparse.topk_encode(torch.eye(2), torch.eye(2), k=1)


def test_no_gpu(gpus, monkeypatch):
    gpus()
    for name in GPU_NAMES:
        assert fastsparse.backends()[name].detail == "no GPU was found: torch.cuda.is_available() is False"
    monkeypatch.setattr(torch.version, "cuda", None)
    for name in GPU_NAMES:
        assert fastsparse.backends()[name].detail == "this PyTorch is built without CUDA"


@pytest.mark.parametrize("kind", ["missing", "broken", "other"])
def test_a_cuda_library_that_does_not_load(gpus, monkeypatch, tmp_path, kind):
    path = tmp_path / "_ops_cuda.so"
    if kind == "broken":
        path.write_bytes(b"not a library")
    elif kind == "other":  # one that loads, and isn't ours
        shutil.copy(Path(torch.__file__).parent / "lib" / "libshm.so", path)
    gpus((9, 0))
    monkeypatch.setattr(backend_module, "_cuda", _CudaLibrary(path))
    described = fastsparse.backends()
    assert not described["cuda"].available
    expected = "was not built: install with nvcc" if kind == "missing" else "could not be loaded: "
    assert described["cuda"].detail.startswith(f"_ops_cuda.so {expected}")
    assert described["triton"].available
    with (
        pytest.raises(RuntimeError, match=r"'cuda' was asked for and can't run here: _ops_cuda\.so"),
        fastsparse.use_backend("cuda"),
    ):
        pass


@pytest.mark.parametrize(
    ("contents", "capability", "served"),
    [
        ("sm_80 sm_90 compute_90", (7, 5), False),
        ("sm_80 sm_90 compute_90", (8, 0), True),
        ("sm_80 sm_90 compute_90", (8, 9), True),
        ("sm_80 sm_90 compute_90", (12, 0), True),
        ("sm_86 compute_86", (8, 0), False),
        ("sm_80 sm_120 compute_120", (10, 0), False),
        ("sm_80 sm_120 compute_120", (12, 1), True),
        ("sm_80 sm_90 sm_120 compute_90 compute_120", (11, 0), True),
    ],
)
def test_which_gpus_the_cuda_library_serves(gpus, monkeypatch, contents, capability, served):
    monkeypatch.setattr(FakeCudaLibrary, "contents", contents)
    gpus(capability)
    backend = fastsparse.backends()["cuda"]
    assert backend.available == served
    if not served:
        major, minor = capability
        assert backend.detail == f"GPU 0 is sm_{major}{minor}: the library holds {contents}"


def test_gpus_of_different_kinds(gpus):
    gpus((7, 5), (9, 0))
    described = fastsparse.backends()
    for name, lack in (
        ("cuda", "the library holds sm_80 sm_90 compute_90"),
        ("triton", "the kernels need sm_80 or later"),
    ):
        assert described[name].available
        assert described[name].detail.endswith(f"not on cuda:0: GPU 0 is sm_75: {lack}")


def test_amd(gpus):
    gpus((9, 4), hip="7.0")
    assert fastsparse.backends()["triton"].available
    assert "on AMD's, Triton serves" in fastsparse.backends()["cuda"].detail


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ("3.6.0", None),
        ("3.10.0+git1", None),
        ("4.0", None),
        ("3.5.1", "triton 3.5.1 is too old: 3.6 or later is needed"),
        (ModuleNotFoundError("No module 'triton'"), "triton can't be imported: No module 'triton'"),
        (AttributeError("half a package"), "triton can't be imported: half a package"),
    ],
)
def test_which_triton_will_do(gpus, monkeypatch, found, reason):
    def import_triton():
        if isinstance(found, Exception):
            raise found
        return types.SimpleNamespace(__version__=found)

    gpus((9, 0))
    monkeypatch.setattr(backend_module, "import_triton", import_triton)
    backend = fastsparse.backends()["triton"]
    assert backend.available == (reason is None)
    assert reason is None or backend.detail == reason
    assert fastsparse.backends()["cuda"].available


@pytest.mark.parametrize("name", GPU_NAMES)
def test_a_gpu_backend_is_chosen_outside_of_compiled_code(name):
    @torch.compile(fullgraph=True, backend="eager")
    def inside(x):
        with fastsparse.use_backend(name):
            return x + 1

    said = f"use_backend: enter '{name}' outside of what torch.compile compiles"
    with pytest.raises(
        Exception, match=f"{said}|raised exception ExceptionVariable"
    ):  # up to 2.10 without words
        inside(torch.ones(2))
    torch.compiler.reset()
