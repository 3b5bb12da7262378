"""Who runs an op, and what is done around it on CUDA tensors, on machines that have no GPU."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_sparse_products import every_product

import fastsparse
from fastsparse import backend
from fastsparse._options import ACTIVATIONS
from fastsparse.ops import _gpu
from fastsparse.ops._choice import choose
from fastsparse.ops._forms import Form
from fastsparse.ops._library import OPS, _without_kernel

SPMM = OPS["spmm"]


BARE = replace(SPMM, kernels=())


@pytest.mark.parametrize(
    ("op", "device", "requested", "broken", "chosen"),
    [
        (SPMM, "cuda", None, (), "cuda"),
        (SPMM, "cuda", None, ("cuda",), "triton"),
        (SPMM, "cuda", None, ("cuda", "triton"), "reference"),
        (SPMM, "cuda", "cuda", (), "cuda"),
        (SPMM, "cuda", "triton", (), "triton"),
        (SPMM, "cuda", "reference", (), "reference"),
        (SPMM, "cpu", None, (), "cpu"),
        (SPMM, "cpu", None, ("cpu",), "reference"),
        (SPMM, "xpu", None, (), "reference"),
        (BARE, "cuda", None, (), "reference"),
    ],
)
def test_the_one_asked_for_or_the_first_that_can_run(op, device, requested, broken, chosen):
    assert choose(op, device, requested, dict.fromkeys(broken, "broken").get) == chosen


@pytest.mark.parametrize(
    ("op", "device", "requested", "reason"),
    [
        (SPMM, "cuda", "cuda", "broken"),
        (SPMM, "cuda", "triton", "broken"),
        (SPMM, "cuda", "cpu", "it runs on cpu tensors"),
        (SPMM, "cpu", "triton", "it runs on cuda tensors"),
        (SPMM, "xpu", "triton", "it runs on cuda tensors"),
        (BARE, "cuda", "cuda", "it has no kernel for this op"),
    ],
)
def test_a_name_that_can_not_be_served_is_refused(op, device, requested, reason):
    message = f"^spmm: backend '{requested}' was asked for and can't run here: {reason}"
    with pytest.raises(RuntimeError, match=message):
        choose(op, device, requested, {requested: "broken"}.get)


@pytest.mark.parametrize(("name", "reason"), [("cpu", "it has no kernel for"), ("cuda", "it runs on cuda")])
def test_an_op_without_a_kernel_runs_by_its_reference_or_not_at_all(monkeypatch, name, reason):
    run = _without_kernel(BARE)
    code = torch.ones(1, 1), torch.zeros(1, 1).long(), torch.ones(1, 1), None
    assert run(*code).item() == 1
    monkeypatch.setattr(backend, "_requested", name)
    with pytest.raises(RuntimeError, match=f"^spmm: backend '{name}' was asked for .*: {reason}"):
        run(*code)


@pytest.fixture
def device(monkeypatch):
    """One GPU that both backends can run on; Triton's kernels don't take fp64."""
    failures = {}
    monkeypatch.setattr(backend, "device_failure", lambda name, index: failures.get(name))
    monkeypatch.setattr(_gpu, "_triton_kernel", lambda op: SimpleNamespace(DTYPES=(torch.float32,)))
    monkeypatch.setattr(_gpu, "_out_of_memory_since_last_asked", lambda index: False)
    _gpu._chosen.cache_clear()
    yield failures
    _gpu._chosen.cache_clear()


def test_dtypes(device):
    assert _gpu._chosen(SPMM, torch.float64, 0, None) == "cuda"
    with pytest.raises(RuntimeError, match=r"'triton' was asked for .*: Triton's kernel isn't for float64"):
        _gpu._chosen(SPMM, torch.float64, 0, "triton")
    assert _gpu._chosen(SPMM, torch.float32, 0, "triton") == "triton"
    device["cuda"] = "the library is broken"
    _gpu._chosen.cache_clear()
    assert _gpu._chosen(SPMM, torch.float32, 0, None) == "triton"
    assert _gpu._chosen(SPMM, torch.float64, 0, None) == "reference"
    with pytest.raises(RuntimeError, match=r"'cuda' was asked for .*: the library is broken"):
        _gpu._chosen(SPMM, torch.float64, 0, "cuda")


@pytest.mark.parametrize("op", OPS)
def test_schemas_are_the_same(op):
    public, private = (
        getattr(getattr(torch.ops, space), op).default for space in ("fastsparse", "fastsparse_cuda")
    )
    assert str(private._schema).replace("fastsparse_cuda::", "fastsparse::") == str(public._schema)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastsparse::{op}", "CUDA")


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    @property
    def device(self):
        return torch.device("cuda", 0)

    @property
    def is_cuda(self):
        return True


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(OnGpu)


def encode(run, mask=None, k=1):
    x = on_gpu(torch.eye(3))
    return run(x, x, None, k, ACTIVATIONS.index("relu"), None, mask, 1)


@pytest.mark.parametrize("name", ["cuda", "triton", "reference"])
def test_the_chosen_one_runs(monkeypatch, name):
    monkeypatch.setattr(_gpu, "_chosen", lambda *question: name)
    monkeypatch.setattr(_gpu, "_run_cuda", lambda op, arguments: "cuda")
    monkeypatch.setattr(_gpu, "_run_triton", lambda op, arguments: "triton")
    monkeypatch.setattr(Form, "check", lambda *_: None)  # the arguments are topk_encode's
    monkeypatch.setattr(Form, "check_indices", lambda *_: None)
    for op in OPS.values():
        op = replace(op, reference=lambda *_: "reference", options={}, check=None)
        assert encode(_gpu.implementation(op)) == name


def test_the_name_that_was_asked_for_is_passed_on(monkeypatch):
    seen = []
    monkeypatch.setattr(_gpu, "_chosen", lambda op, *question: seen.append(question) or "reference")
    run = _gpu.implementation(replace(OPS["topk_encode"], reference=lambda *_: None))
    encode(run)
    with fastsparse.use_backend("reference"):
        encode(run)
    assert seen == [(torch.float32, 0, None), (torch.float32, 0, "reference")]


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_gpu_backend_that_was_asked_for_goes_to_the_op(monkeypatch, name):
    """There, knowing the device, it is insisted on: not in what torch.compile traces."""
    monkeypatch.setattr(backend, "_requested", name)
    monkeypatch.setattr(backend, "_require", lambda _: pytest.fail("asked before the op"))
    assert backend.wants_reference(on_gpu(torch.eye(2))) is False


def test_too_few_eligible_latents(monkeypatch):
    """Refused before anything runs, except in a CUDA graph, where nothing may wait for the device."""
    monkeypatch.setattr(_gpu, "_chosen", lambda *_: "cuda")
    monkeypatch.setattr(_gpu, "_run_cuda", lambda op, arguments: "ran")
    capturing = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    run = _gpu.implementation(OPS["topk_encode"])
    mask = on_gpu(torch.tensor([True, False, True]))
    assert encode(run, mask, k=2) == "ran"
    with pytest.raises(ValueError, match=r"topk_encode: k must be .* eligible latents \(2\), got k=3"):
        encode(run, mask, k=3)
    capturing.append(True)
    assert encode(run, mask, k=3) == "ran"


@every_product
def test_triton_checks_indices_when_asked_to(monkeypatch, product):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kernel = SimpleNamespace(**{product.name: lambda *arguments: "ran"})
    monkeypatch.setattr(_gpu, "_triton_kernel", lambda name: kernel)
    monkeypatch.setattr(_gpu, "_chosen", lambda *_: "triton")
    run = _gpu.implementation(OPS[product.name])
    for index, refused in ((2, False), (3, True), (-1, True)):
        made = product.make(1, 2, 3, 4)
        made[product.takes.index("indices")][0, 1] = index
        arguments = [on_gpu(value) if isinstance(value, torch.Tensor) else value for value in made]
        monkeypatch.delenv("FASTSPARSE_DEBUG", raising=False)
        arguments.append(None)  # offsets
        assert run(*arguments) == "ran"
        monkeypatch.setenv("FASTSPARSE_DEBUG", "1")
        if refused:
            with pytest.raises(IndexError, match=rf"indices\[0, 1\] must be in \[0, 3\), got {index}"):
                run(*arguments)
        else:
            assert run(*arguments) == "ran"


@pytest.fixture
def failing_kernel(monkeypatch):
    """A CUDA kernel that fails with a message, on a GPU that has seen a number of failed allocations."""
    state = SimpleNamespace(message="", ooms=3)

    def fail(*_):
        raise RuntimeError(state.message)

    kernels = SimpleNamespace(spmm=SimpleNamespace(default=fail))
    monkeypatch.setattr(torch.ops, "fastsparse_cuda", kernels, raising=False)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_ooms": state.ooms})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**29, 2**37))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**36)
    monkeypatch.setattr(_gpu, "_seen", {0: 3})
    return state


def test_out_of_memory_is_pytorchs_own_error(failing_kernel):
    failed = "spmm: PyTorch failed: its reason stands in what it wrote to standard error"
    memory = (
        "CUDA out of memory: spmm on cuda:0, where 0.50 GiB of 128.00 GiB are free and .* holds 64.00 GiB"
    )
    for ooms, message, error, expected in (
        (3, failed, RuntimeError, "PyTorch failed"),  # something else was wrong
        (4, failed, torch.OutOfMemoryError, memory),
        (4, failed, RuntimeError, "PyTorch failed"),  # the same count again is no news
        (5, "fastsparse: launching spmm: invalid argument", RuntimeError, "invalid argument"),
    ):
        failing_kernel.ooms, failing_kernel.message = ooms, message
        with pytest.raises(error, match=expected) as caught:
            _gpu._run_cuda("spmm", (on_gpu(torch.ones(1)),))
        assert type(caught.value) is error
