"""poly_relu and its gradient on every backend."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import DTYPES, LAYOUTS, laid_out
from polynomials import assert_forward, assert_gradients, problem
from strategies import tensors
from test_poly_norm import SHAPES

import fastsparse
from fastsparse.ops.poly_relu import poly_relu_backward


def check(x, weight, bias, d_y):
    """Both ways, held against fp64."""
    y = fastsparse.poly_relu(x, weight, bias)
    assert_forward(y, x, weight, bias, None)
    found = poly_relu_backward(x, weight, d_y, True, True)
    assert_gradients(found, x, weight, d_y, None)
    return y, *found


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_shapes(backend, shape):
    check(*problem(*shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(backend, dtype, layout):
    """Of kernels the same bits in whatever layout: the reference is PyTorch's own sums."""
    x, weight, bias, d_y = problem(19, 37, dtype=dtype, scale=3.0)
    right = check(x, weight, bias, d_y)
    found = check(*(laid_out(part, layout) for part in (x, weight, bias, d_y)))
    same = all(torch.equal(*pair) for pair in zip(found, right, strict=True))
    assert same or backend in ("reference", "registered")
    one = d_y[:1, :1].expand_as(d_y)  # as of y.sum()
    assert_gradients(poly_relu_backward(x, weight, one, True, True), x, weight, one, None)


def test_by_hand(backend):
    x, weight, bias = torch.tensor([[-2.0, -0.0, 0.0, 0.5, 2.0]]), torch.tensor([1.0, -3, 2]), torch.ones(1)
    assert fastsparse.poly_relu(x, weight, bias).tolist() == [[1, 1, 1, 1.375, 1]]
    d_x, d_weight, d_bias = poly_relu_backward(x, weight, torch.ones(1, 5), True, True)
    assert d_x.tolist() == [[0, 0, 0, -0.25, 2]]
    assert d_weight.tolist() == [8.125, 4.25, 2.5]
    assert d_bias.tolist() == [5]


def test_it_is_the_composition_that_people_write(backend):
    """With its gradients, by PyTorch."""
    x, weight, bias, d_y = problem(7, 50, dtype=torch.float64)
    leaves = [leaf.requires_grad_() for leaf in (x, weight, bias)]
    right = sum(a * torch.pow(torch.relu(x), p) for a, p in zip(weight, (3, 2, 1), strict=True)) + bias
    found = fastsparse.poly_relu(x, weight, bias)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(*(torch.autograd.grad(y, leaves, d_y) for y in (found, right)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_whose_powers_leave_them(backend, dtype):
    check(*problem(6, 70, dtype=dtype, scale=60.0))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_entry(backend, bad):
    """NaN stays NaN; at most 0 is what stops a gradient, whatever it is."""
    for place in (0, 36):
        x, weight, bias, d_y = problem(5, 37)
        right, d_right = check(x, weight, bias, d_y)[:2]
        others = torch.ones_like(x, dtype=torch.bool)
        others[2, place] = False
        x[2, place] = bad
        y, d_x, d_weight, _ = check(x, weight, bias, d_y)
        assert torch.equal(y[others], right[others])
        assert torch.equal(d_x[others], d_right[others])
        if bad < 0:
            assert y[2, place] == bias
            assert d_x[2, place] == 0
        else:
            assert not y[2, place].isfinite()
            assert not d_x[2, place].isfinite()
            assert not d_weight.isfinite().any()
    x, weight, bias, d_y = problem(5, 37)
    x[1], x[2] = -x[1].abs(), x[2].abs()
    d_y[1:3, 3] = bad
    _, d_x, d_weight, d_bias = check(x, weight, bias, d_y)
    assert not d_x[1].any()
    assert not d_x[2, 3].isfinite()
    assert not d_weight.isfinite().any()
    assert not d_bias.isfinite().any()


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (2, 0, 4)])
def test_nothing_to_do(backend, shape):
    leaves = [leaf.requires_grad_() for leaf in (torch.zeros(shape), torch.ones(3), torch.ones(1))]
    y = fastsparse.poly_relu(*leaves)
    assert y.shape == shape
    y.sum().backward()
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)


@given(data=st.data(), N=st.integers(1, 3), D=st.integers(1, 40))
def test_whatever_comes(backend, data, N, D):
    x, d_y = (data.draw(tensors((N, D))) for _ in range(2))
    check(x, data.draw(tensors(3, st.floats(-2, 2, width=32))), data.draw(tensors(1)), d_y)


def test_bad_arguments():
    x, weight, bias, _ = problem(2, 4)
    cases = [
        (TypeError, (x, [1.0, 1.0, 1.0], bias), "weight must be a torch.Tensor, got list"),
        (TypeError, (x.long(), weight, bias), "x must be float32, bfloat16, float16 or float64, got int64"),
        (ValueError, (x[0, 0], weight, bias), "x must have shape (..., D), got a scalar"),
        (ValueError, (x, weight[:2], bias), "weight must have shape (3,) = (3,), got shape (2,)"),
        (ValueError, (x, weight, bias[:0]), "bias must have shape (1,) = (1,), got shape (0,)"),
        (ValueError, (x, weight, bias.half()), "bias must have the dtype of x (float32), got float16"),
    ]
    for error, arguments, message in cases:
        with pytest.raises(error, match=f"^poly_relu: {re.escape(message)}"):
            fastsparse.poly_relu(*arguments)


def random_call(draw) -> int:
    D = draw.size("D", 5000)
    N = draw.size("N", draw.work / D / 4)
    x, d_y, bias = draw.numbers("x", N, D), draw.numbers("d_y", N, D), draw.numbers("bias", 1)
    weight = draw.numbers("weight", 3, family=draw.choose("weights are", ("gaussian", "ties")))
    y = draw.run(lambda: fastsparse.poly_relu(x, weight, bias))
    found = draw.run(lambda: poly_relu_backward(x, weight, d_y, True, True))
    x, weight, bias, d_y = draw.flushed(x, weight, bias, d_y)
    with draw.oracle():
        assert_forward(y, x, weight, bias, None)
        assert_gradients(found, x, weight, d_y, None)
    return N
