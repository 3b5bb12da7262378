"""poly_norm and its gradient on every backend: each power of a row by its own root mean square."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import DTYPES, LAYOUTS, laid_out, random
from polynomials import assert_forward, assert_gradients, problem
from strategies import tensors

import fastsparse
from fastsparse import reference
from fastsparse.ops.poly_norm import poly_norm_backward

EPS = 1e-6
# (N, D), around the edges of vectors, of blocks of columns and of rows; rows of several blocks.
SHAPES = [
    *(
        (1, 1),
        (2, 3),
        (3, 4),
        (5, 7),
        (1, 8),
        (4, 9),
        (7, 15),
        (33, 16),
        (2, 17),
        (65, 31),
        (3, 64),
        (17, 65),
    ),
    *((2, 127), (1, 1024), (3, 1025), (2, 2049), (1, 4100), (130, 5)),
]


def check(x, weight, bias, d_y, eps=EPS):
    """Both ways, held against fp64."""
    y = fastsparse.poly_norm(x, weight, bias, eps)
    assert_forward(y, x, weight, bias, eps)
    found = poly_norm_backward(x, weight, eps, d_y, True, True)
    assert_gradients(found, x, weight, d_y, eps)
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
    assert_gradients(poly_norm_backward(x, weight, EPS, one, True, True), x, weight, one, EPS)


def test_by_hand(backend):
    """The mean squares are 25 / 2, 337 / 2 and 4825 / 2."""
    x = torch.tensor([[3.0, -4.0]], dtype=torch.float64)
    for weight, right in (([0, 0, 1], [3, -4, 25]), ([0, 1, 0], [9, 16, 337]), ([1, 0, 0], [27, -64, 4825])):
        y = fastsparse.poly_norm(x, torch.tensor(weight).double(), torch.tensor([0.5]).double(), 0.0)
        first, second, squares = right
        expected = torch.tensor([[first, second]]).double() / (squares / 2) ** 0.5 + 0.5
        torch.testing.assert_close(y, expected)


def test_it_is_the_composition_that_people_write(backend):
    """With its gradients, by PyTorch."""
    x, weight, bias, d_y = problem(7, 50, dtype=torch.float64)
    leaves = [leaf.requires_grad_() for leaf in (x, weight, bias)]

    def norm(x):
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS)

    right = weight[0] * norm(x**3) + weight[1] * norm(x**2) + weight[2] * norm(x) + bias
    found = fastsparse.poly_norm(x, weight, bias)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(*(torch.autograd.grad(y, leaves, d_y) for y in (found, right)))


def test_scale_goes_out(backend):
    """Of every row, where eps is 0."""
    x, weight, bias, _ = problem(5, 33, dtype=torch.float64)
    factors = torch.tensor([[1e-3], [0.5], [1.0], [7.0], [1e4]], dtype=torch.float64)
    y = fastsparse.poly_norm(factors * x, weight, bias, 0.0)
    torch.testing.assert_close(y, fastsparse.poly_norm(x, weight, bias, 0.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.05, 8.0, 500.0])
def test_halves_whose_powers_leave_them(backend, dtype, scale):
    check(*problem(6, 70, dtype=dtype, scale=scale))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(backend, bad):
    """NaN is then all of its row, while beside an infinity the other entries are the bias."""
    for place in (0, 36):
        x, weight, bias, d_y = problem(5, 37)
        right = fastsparse.poly_norm(x, weight, bias)
        d_right, *_ = poly_norm_backward(x, weight, EPS, d_y, True, False)
        others = torch.arange(5) != 2
        x[2, place] = bad
        y, d_x, d_weight, _ = check(x, weight, bias, d_y)
        assert torch.equal(y[others], right[others])
        assert torch.equal(d_x[others], d_right[others])
        assert d_x[2].isnan().all()
        assert d_weight.isnan().all()
        apart = torch.arange(37) != place
        assert y[2].isnan().all() if bad != bad else (y[2, apart] == bias).all()
        assert y[2, place].isnan()
    x, weight, bias, d_y = problem(5, 37)
    d_y[2, 3] = bad
    _, d_x, d_weight, d_bias = check(x, weight, bias, d_y)
    assert torch.equal(d_x[others], d_right[others])
    assert not d_x[2].isfinite().any()
    assert not d_weight.isfinite().any()
    assert not d_bias.isfinite().any()


def test_powers_that_leave_fp32(backend):
    """A mean square that overflows leaves nothing of its power, as the definition in fp32 has it."""
    scales = torch.logspace(-8, 18, 27).unsqueeze(1)
    x = scales * torch.where(random(27, 40, seed=1) > 0, 1.0, -1.0)
    weight, bias, d_y = torch.ones(3), torch.zeros(1), random(27, 40, seed=2)
    y, right = fastsparse.poly_norm(x, weight, bias), reference.poly_norm(x, weight, bias, EPS)
    torch.testing.assert_close(y, right, equal_nan=True)
    found = poly_norm_backward(x, weight, EPS, d_y, True, False)[0]
    right = reference.poly_norm_backward(x, weight, EPS, d_y, True, False)[0]
    assert torch.equal(found.isnan(), right.isnan())
    assert found[(scales < 1e6).expand_as(found)].isfinite().all()


def test_zeros(backend):
    """Rows of them give the bias; without eps nobody knows."""
    x, weight, bias, d_y = problem(3, 9)
    x[1] = 0
    y, d_x, *_ = check(x, weight, bias, d_y)
    assert (y[1] == bias).all()
    torch.testing.assert_close(d_x[1], weight[2] * d_y[1] * 1e3)
    assert fastsparse.poly_norm(x, weight, bias, 0.0)[1].isnan().all()


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 4), (2, 0, 4)])
def test_nothing_to_do(backend, shape):
    leaves = [leaf.requires_grad_() for leaf in (torch.zeros(shape), torch.ones(3), torch.ones(1))]
    y = fastsparse.poly_norm(*leaves)
    assert y.shape == shape
    y.sum().backward()
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)


@given(data=st.data(), N=st.integers(1, 3), D=st.integers(1, 40))
def test_whatever_comes(backend, data, N, D):
    x, d_y = (data.draw(tensors((N, D), st.floats(-100, 100, width=32))) for _ in range(2))
    weight, bias = data.draw(tensors(3, st.floats(-2, 2, width=32))), data.draw(tensors(1))
    check(x, weight, bias, d_y)


def test_bad_arguments():
    x, weight, bias, _ = problem(2, 4)
    cases = [
        (TypeError, (None, weight, bias), "x must be a torch.Tensor, got NoneType"),
        (TypeError, (x.int(), weight, bias), "x must be float32, bfloat16, float16 or float64, got int32"),
        (ValueError, (x[0, 0], weight, bias), "x must have shape (..., D), got a scalar"),
        (ValueError, (x[:, :0], weight, bias), "x must have at least one feature, got shape (2, 0)"),
        (ValueError, (x, weight[:2], bias), "weight must have shape (3,) = (3,), got shape (2,)"),
        (ValueError, (x, weight, bias[0]), "bias must have shape (1,) = (1,), got shape ()"),
        (ValueError, (x, weight.double(), bias), "weight must have the dtype of x (float32), got float64"),
        (ValueError, (x, weight, bias, -1e-6), "eps must be finite and at least 0, got eps=-1e-06"),
        (ValueError, (x, weight, bias, torch.inf), "eps must be finite and at least 0, got eps=inf"),
        (TypeError, (x, weight, bias, None), "eps must be a float, got None of type NoneType"),
    ]
    for error, arguments, message in cases:
        with pytest.raises(error, match=f"^poly_norm: {re.escape(message)}"):
            fastsparse.poly_norm(*arguments)


def random_call(draw) -> int:
    D = draw.size("D", 5000)
    N = draw.size("N", draw.work / D / 4)
    x, d_y, bias = draw.numbers("x", N, D), draw.numbers("d_y", N, D), draw.numbers("bias", 1)
    weight = draw.numbers("weight", 3, family=draw.choose("weights are", ("gaussian", "ties")))
    eps = draw.choose("eps", (0.0, 1e-6, 1e-3))
    y = draw.run(lambda: fastsparse.poly_norm(x, weight, bias, eps))
    found = draw.run(lambda: poly_norm_backward(x, weight, eps, d_y, True, True))
    x, weight, bias, d_y = draw.flushed(x, weight, bias, d_y)
    with draw.oracle():
        assert_forward(y, x, weight, bias, eps)
        assert_gradients(found, x, weight, d_y, eps)
    return N
