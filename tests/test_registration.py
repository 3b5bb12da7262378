"""Between PyTorch's dispatcher and every op: tensors are looked at, nothing is lost, errors speak."""

import ctypes
import gc
import re

import pytest
import torch
from test_composition import OP_INPUTS, tensors
from test_imports import ROOT

import fastsparse
from fastsparse.ops._forms import FORMS

# The last size of these, by op and argument, is that of no other tensor.
FREE = {("spmm", 2), ("spmm_t", 2), ("sddmm", 2)}
every_op = pytest.mark.parametrize("op", OP_INPUTS)


def good_arguments(op: str) -> list:
    """Of the first of OP_INPUTS, without gradients."""
    made = OP_INPUTS[op][0](*tensors("x", "weight", "bias"))
    return [part.detach() if isinstance(part, torch.Tensor) else part for part in made]


def test_kernels_and_python_demand_the_same():
    text = (ROOT / "csrc" / "forms.h").read_text()
    compiled = {
        op: "".join(re.findall('"([^"]*)"', parts))
        for op, parts in re.findall(r'constexpr char (\w+)\[\] =\s+((?:"[^"]*"\s*)+);', text)
    }
    assert compiled == {op: form.text for op, form in FORMS.items()}


@every_op
def test_an_op_called_directly_looks_at_its_tensors(backend, op):
    overload, good = getattr(torch.ops.fastsparse, op).default, good_arguments(op)
    overload(*good)
    for place, tensor in enumerate(good):
        if not isinstance(tensor, torch.Tensor):
            continue
        wrong_ones = [tensor.unsqueeze(0)]
        wrong_ones += [tensor.to(torch.int16)] if place > 0 else []
        wrong_ones += [tensor[..., :-1]] if (op, place) not in FREE else []
        for wrong in wrong_ones:
            with pytest.raises(ValueError, match=rf"^{op}: \w+ must (have|be) "):
                overload(*good[:place], wrong, *good[place + 1 :])


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
