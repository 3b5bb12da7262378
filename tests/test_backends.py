"""The tests' own backends: which are left out here and why, and that a replaced op is the one that runs."""

import os
from dataclasses import replace

import pytest
import torch
from backends import GPU_BACKENDS, GpuBackend, leave_out, missing, running
from hypothesis import given
from hypothesis import strategies as st
from samples import calls
from test_sparse_products import SDDMM, SPMM, SPMM_T

import fastsparse
from fastsparse.ops._library import OPS

CODE = torch.tensor([[2.0]]), torch.tensor([[1]])


@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_runs_here(name):
    reason = missing(name)
    if reason:
        pytest.skip(f"{name} is left out: {reason}")
    with running(name):
        assert fastsparse.spmm(*CODE, torch.eye(2)).tolist() == [[0.0, 2.0]]


@pytest.fixture
def recorded(monkeypatch):
    """A backend named "recorded" that answers every op by its name alone and keeps the names."""
    calls = []

    def run(op, *arguments):
        calls.append(op)
        return (
            (arguments[0][:, :1], torch.zeros(1, 1, dtype=torch.int64))
            if op == "topk_encode"
            else CODE[0] * 0
        )

    monkeypatch.setitem(GPU_BACKENDS, "recorded", GpuBackend(lambda: None, run, work=10_000))
    return calls


def test_an_op_is_replaced_and_comes_back(recorded):
    weight = torch.ones(2, 1)
    for _ in range(2):
        with running("recorded"):
            assert fastsparse.spmm(*CODE, weight).tolist() == [[0.0]]
            fastsparse.spmm_t(*CODE, CODE[0], 2)
            fastsparse.topk_encode(CODE[0], weight, k=1)
        assert recorded == ["spmm", "spmm_t", "topk_encode"]
        assert fastsparse.spmm(*CODE, weight).tolist() == [[2.0]]
        recorded.clear()


def test_gradients_run_on_the_replaced_ops(recorded):
    with running("recorded"):
        fastsparse.spmm(CODE[0].clone().requires_grad_(), CODE[1], torch.ones(2, 1)).backward()
    assert recorded == ["spmm", SDDMM.name]


def test_what_is_too_large_is_left_out(recorded):
    with running("recorded"), pytest.raises(pytest.skip.Exception, match="too large"):
        fastsparse.spmm(*CODE, torch.ones(2, 10_001))
    assert recorded == []


def test_every_op_has_a_record_and_samples():
    names = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    assert {name for namespace, name in names if namespace == "fastsparse"} == set(OPS)
    assert all(calls().values())


def test_an_op_with_kernels_of_another_kind_is_left_out(monkeypatch):
    monkeypatch.setitem(OPS, "spmm", replace(OPS["spmm"], kernels=("cuda",)))
    for kernels in ("cuda", "triton"):
        backend = GpuBackend(lambda: None, lambda op, *_: torch.ones(1, 1), kernels)
        monkeypatch.setitem(GPU_BACKENDS, "recorded", backend)
        with running("recorded"):
            if kernels == "cuda":
                assert fastsparse.spmm(*CODE, torch.ones(2, 1)).item() == 1
            else:
                with pytest.raises(pytest.skip.Exception, match="spmm has no triton kernel"):
                    fastsparse.spmm(*CODE, torch.ones(2, 1))


@pytest.mark.parametrize("name", ["triton-interpreted", "triton-gpu"])
def test_a_dtype_that_a_triton_kernel_is_not_for_is_left_out(name):
    pytest.importorskip("triton")
    one = torch.ones(1, 2, 1, dtype=torch.float64)
    with pytest.raises(pytest.skip.Exception, match="Triton's linear_recurrence isn't for float64"):
        GPU_BACKENDS[name].run("linear_recurrence", one, one, None, None, False)


def test_indices_out_of_range_are_run_under_the_check(monkeypatch):
    monkeypatch.delenv("FASTSPARSE_DEBUG", raising=False)
    seen = []

    def run(op, *arguments):
        seen.append(os.environ.get("FASTSPARSE_DEBUG"))
        return torch.zeros(1, 1)

    monkeypatch.setitem(GPU_BACKENDS, "asks", GpuBackend(lambda: None, run))
    weight = torch.ones(2, 1)
    with running("asks"):
        for indices in (CODE[1], CODE[1] + 1, CODE[1] - 2, CODE[1]):
            SPMM(CODE[0], indices, weight)
            SDDMM(CODE[0], weight, indices)
            SPMM_T(CODE[0], indices, CODE[0], 2)
    assert seen == [None] * 3 + ["1"] * 6 + [None] * 3


def test_a_skip_in_a_backward_ends_the_test(monkeypatch):
    def run(op, *arguments):
        return leave_out("no such kernel") if op == SDDMM.name else torch.zeros(1, 2)

    monkeypatch.setitem(GPU_BACKENDS, "half", GpuBackend(lambda: None, run))
    with running("half"):
        out = fastsparse.spmm(CODE[0].clone().requires_grad_(), CODE[1], torch.eye(2))
        with pytest.raises(pytest.skip.Exception, match="no such kernel"):
            out.sum().backward()


def test_a_skip_in_a_property_ends_its_example_alone():
    seen = []

    @given(st.integers(0, 9))
    def check(number):
        if number % 2:
            leave_out("odd")
        seen.append(number)

    check()
    assert len(set(seen)) > 1
