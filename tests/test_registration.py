"""Between PyTorch's dispatcher and every op: tensors are looked at, nothing is lost, errors speak."""

import ctypes
import gc
import re
from pathlib import Path

import pytest
import torch
from samples import calls

import fastsparse
from fastsparse.ops._forms import Form
from fastsparse.ops._library import OPS

ROOT = Path(__file__).parents[1]
every_op = pytest.mark.parametrize("op", OPS)


def good_arguments(op: str) -> list:
    return calls()[op][0]


def bad_tensors(op: str) -> list[tuple[int, torch.Tensor]]:
    """Every tensor of the good arguments made wrong in each way that its form can tell, with its place."""
    good, wrong = good_arguments(op), []
    places = [place for place, value in enumerate(good) if isinstance(value, torch.Tensor)]
    symbols = [symbol for entry in OPS[op].form.taken[0] for symbol in entry.shape]
    for place, entry in zip(places, OPS[op].form.taken[0], strict=False):
        tensor = good[place]
        wrong.append((place, tensor.unsqueeze(0)))
        if place > 0:
            wrong.append((place, tensor.to(torch.int16)))
        if symbols.count(entry.shape[-1]) > 1 or entry.shape[-1].isdecimal():
            wrong.append((place, tensor[..., :-1]))
    return wrong


@every_op
def test_an_op_called_directly_looks_at_its_tensors(backend, op):
    overload, good = getattr(torch.ops.fastsparse, op).default, good_arguments(op)
    overload(*good)
    for place, wrong in bad_tensors(op):
        with pytest.raises(ValueError, match=rf"^{op}: \w+ must (have|be) "):
            overload(*good[:place], wrong, *good[place + 1 :])


@every_op
def test_what_runs_an_op_says_which_files_do(op):
    record, run = OPS[op], getattr(fastsparse.ops, op)
    assert run.__name__ == op
    assert record.files.keys() == {*record.kernels, "reference"}
    for backend, file in record.files.items():
        assert f"{file} ({backend})" in run.__doc__
        assert re.search(rf"\b{op}\b", (ROOT / file).read_text()), file


def test_a_form_is_read_whole():
    with pytest.raises(ValueError, match="form: must be entries such as"):
        Form("x [N, D] -> (N)", ["x"])
    form = Form(
        "x (N, D), h0 (S, 2)?, index (N) int64 < M, cu_seqlens (S + 1) int64? -> y (S, M) if needs_y | "
        "x (N, 2, D) -> (2, D) int32",
        ["x", "h0", "index", "cu_seqlens", "M", "needs_y"],
    )
    assert form.demands == "x (N, D), h0 (S, 2)?, index (N) int64, cu_seqlens (S + 1) int64? | x (N, 2, D)"
    x, index = torch.ones(3, 5), torch.ones(3).long()
    assert form.indices((x, None, index, None, 7, True)) == [(index, 7)]
    assert form.empty((x, None, index, torch.ones(5), 7, True)).shape == (4, 7)
    assert form.empty((x, None, index, torch.ones(5), 7, False)).shape == (0,)
    other = form.empty((torch.ones(3, 2, 4), None, None, None, 7, False))
    assert (other.shape, other.dtype) == ((2, 4), torch.int32)
    form = Form("v (N, k) -> (N) | v (E), at (N + 1) int64 -> (N) wide, (E), (g k)", ["v", "at", "g", "k"])
    assert form.empty((torch.ones(3, 5), None, 2, 4)).shape == (3,)
    rows, entries, product = form.empty((torch.ones(9).half(), torch.ones(4).long(), 2, 4))
    assert (rows.shape, rows.dtype, entries.shape, product.shape) == ((3,), torch.float32, (9,), (8,))


@pytest.mark.skipif(not fastsparse.backends()["cpu"].available, reason="no compiled kernels")
@every_op
def test_no_call_loses_memory(op, threads):
    overload, good, calls = getattr(torch.ops.fastsparse, op).default, good_arguments(op), 2000
    threads(1)
    for _ in range(calls // 4):
        overload(*good)
    gc.collect()
    before = bytes_in_use()
    for _ in range(calls):
        overload(*good)
    gc.collect()
    assert bytes_in_use() - before < 8 * calls


def bytes_in_use() -> int:
    """Of the C library's memory: in its arenas, and in maps."""
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        pytest.skip("only glibc tells how much memory is in use")
    ask.restype = _Mallinfo
    info = ask()
    return info.field4 + info.field7


class _Mallinfo(ctypes.Structure):
    _fields_ = tuple((f"field{i}", ctypes.c_size_t) for i in range(10))


def test_what_pytorch_failed_at_is_said(backend):
    # A gigantic view costs nothing, its result can't be had.
    values, indices = torch.ones(1).expand(2**44, 1), torch.zeros(1, dtype=torch.int64).expand(2**44, 1)
    with pytest.raises(RuntimeError, match=r"can't allocate|out of memory|would have a storage size"):
        fastsparse.spmm(values, indices, torch.ones(1, 64))
