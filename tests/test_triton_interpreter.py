"""The interpreter that Triton kernels are tested under: it casts as GPUs do, and checks every address."""

import pytest
import torch
from triton_interpreter import interpreting, unavailable

if unavailable():
    pytest.skip(unavailable(), allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def _shifted(x, y, n, shift):
    """y[i + shift] = x[i], i < n"""
    at = tl.arange(0, 16)
    tl.store(y + at + shift, tl.load(x + at, mask=at < n).to(y.dtype.element_ty), mask=at < n)


def copied(x: torch.Tensor, y: torch.Tensor, n: int, shift: int = 0) -> None:
    with interpreting():
        _shifted[(1,)](x, y, n, shift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_memory_of_the_arguments_may_be_used(dtype):
    store = torch.arange(12).to(dtype)
    out = torch.zeros(12, dtype=dtype)
    copied(store[2:5], out[2:5], 10)  # into what lies behind the views too
    assert torch.equal(out[2:], store[2:])
    copied(store, out, 11, 1)
    assert torch.equal(out[1:], store[:-1])
    copied(store[:0], out, 0)


@pytest.mark.parametrize(
    ("read", "written", "n", "shift", "message"),
    [
        (9, 16, 10, 0, "_shifted reads outside its arguments: 1 of 10 addresses"),
        (16, 9, 10, 0, "_shifted writes outside its arguments: 1 of 10 addresses"),
        (16, 16, 10, -1, "_shifted writes outside its arguments: 1 of 10 addresses"),
        (16, 16, 16, 3, "_shifted writes outside its arguments: 3 of 16 addresses"),
        (0, 16, 1, 0, "_shifted reads outside its arguments: 1 of 1 addresses"),
    ],
)
def test_other_memory_may_not(read, written, n, shift, message):
    beyond = torch.ones(64)
    with pytest.raises(InterpreterError, match=message):
        copied(beyond[:read].clone(), beyond[:written].clone(), n, shift)


def test_an_earlier_launch_leaves_no_permission():
    x, y, z = torch.ones(16), torch.zeros(16), torch.zeros(16)
    distance = (y.data_ptr() - z.data_ptr()) // 4
    with interpreting():
        _shifted[(1,)](x, y, 16, 0)
        with pytest.raises(InterpreterError, match="writes outside"):
            _shifted[(1,)](x, z, 16, distance)
    assert torch.equal(z, torch.zeros(16))


def test_bf16_is_cast_as_gpus_do():
    # Halfway between neighbours, just above, subnormal, and what is not finite.
    numbers = [1 + 2.0**-8, 1 + 2.0**-8 + 2.0**-20, 3 * 2.0**-8 + 1, 2.0**-130, -(2.0**-133), 3.4e38]
    numbers += [torch.inf, -torch.inf, -0.0, 0.0]
    exact = torch.tensor(numbers)
    halves, back = torch.zeros(10, dtype=torch.bfloat16), torch.zeros(10)
    copied(exact, halves, 10)
    assert torch.equal(halves.view(torch.int16), exact.bfloat16().view(torch.int16))
    copied(halves, back, 10)
    assert torch.equal(back.view(torch.int32), halves.float().view(torch.int32))


@triton.jit
def _affine(a, b, a_later, b_later):
    return a_later * a, a_later * b + b_later


@triton.jit
def _recurrence(a, b, h, AXIS: tl.constexpr, T: tl.constexpr):
    at = tl.arange(0, T)[:, None] * 4 + tl.arange(0, 4)[None, :]
    if AXIS == 1:
        at = tl.trans(at)
    _, states = tl.associative_scan((tl.load(a + at), tl.load(b + at)), AXIS, _affine)
    tl.store(h + at, states)


@pytest.mark.parametrize("T", [1, 2, 8, 32])
@pytest.mark.parametrize("axis", [0, 1])
def test_scans_are_of_slices(T, axis):
    a, b, h = torch.rand(T, 4), torch.randn(T, 4), torch.zeros(T, 4)
    with interpreting():
        _recurrence[(1,)](a, b, h, axis, T)
    state = torch.zeros(4)
    for t in range(T):
        state = a[t] * state + b[t]
        torch.testing.assert_close(h[t], state)


def test_triton_is_left_as_it_was():
    from triton.runtime import interpreter

    def state() -> list:
        builder = vars(interpreter.InterpreterBuilder)
        names = "cast_impl", "create_masked_load", "create_masked_store"
        scan = interpreter.ScanOps.generic_scan
        return [tl.load, tl.sum, tl.core.load, interpreter._patch_lang, scan, *(builder[n] for n in names)]

    before = state()
    with interpreting():
        _shifted[(1,)](torch.ones(1), torch.ones(1), 1, 0)
        assert state() != before
    assert state() == before
