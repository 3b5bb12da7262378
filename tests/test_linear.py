"""``linear``, the products around our ops: PyTorch's answers and derivatives, by either of its libraries."""

import pytest
import torch
import torch.nn.functional as F

from fastsparse.backend import _cpu
from fastsparse.functional import _linear
from fastsparse.functional._linear import linear, outer

ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture
def served(monkeypatch):
    """Every product of anything goes to oneDNN, whose calls are counted."""
    if not ONEDNN:
        pytest.skip("this PyTorch has no oneDNN")
    calls = []
    original = torch.ops.mkldnn._linear_pointwise

    class Counted:
        def __call__(self, *arguments):
            calls.append(arguments)
            return original(*arguments)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", Counted())
    monkeypatch.setattr(_linear, "MUCH", 1)
    monkeypatch.setitem(vars(_cpu), "prefers_onednn", True)
    return calls


def problem(shape, M, *, bias=True, across=False):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    weight = draw(shape[-1], M).T if across else draw(M, shape[-1])
    return [tensor.requires_grad_() for tensor in (draw(*shape), weight, *([draw(M)] if bias else []))]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (2, 3, 8), (64, 33)], ids=str)
@pytest.mark.parametrize("M", [1, 6, 40])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("across", [True, False])
def test_values_and_gradients_are_those_of_pytorch(served, shape, M, bias, across):
    inputs = problem(shape, M, bias=bias, across=across)
    found, expected = linear(*inputs), F.linear(*inputs)
    close(found, expected)
    grad = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        assert a.shape == b.shape
        close(a, b)
    assert len(served) == 3  # the product, and the gradients of both factors


def test_second_derivatives_are_those_of_pytorch(served):
    inputs = problem((6, 5), 4)

    def second(product):
        out = product(*inputs).square().sum()
        first = torch.autograd.grad(out, inputs, create_graph=True)
        return torch.autograd.grad(sum(part.pow(3).sum() for part in first), inputs)

    for a, b in zip(second(linear), second(F.linear), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2)


def test_only_the_gradients_that_are_wanted_are_made(served):
    x, weight, bias = problem((6, 5), 4)
    torch.autograd.grad(linear(x.detach(), weight, bias).sum(), weight)
    assert len(served) == 2


@pytest.mark.parametrize("rows", [0, 3])
def test_outer(served, rows):
    a, b = torch.randn(rows, 4), torch.randn(rows, 6)
    close(outer(a, b), a.T @ b)
    close(outer(b, a), b.T @ a)
    assert outer(b, a).is_contiguous()


def test_what_is_not_plain_is_pytorchs_own(served):
    x, weight, bias = (tensor.detach() for tensor in problem((6, 5), 4))
    linear(x.double(), weight.double(), bias.double())
    linear(x[0], weight, bias)
    linear(x.to("meta"), weight.to("meta"), bias.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    close(torch.func.vmap(lambda row: linear(row, weight, bias))(x[None])[0], F.linear(x, weight, bias))
    assert not served


def test_little_work_is_pytorchs_own(served, monkeypatch):
    monkeypatch.setattr(_linear, "MUCH", 6 * 5 * 4 + 1)
    linear(*problem((6, 5), 4))
    assert not served


def test_a_wrong_shape_is_told_by_pytorch(served):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.zeros(3, 4), torch.zeros(2, 5))


def test_strides_of_views(served):
    x = torch.randn(5, 8, 6).transpose(0, 1)[:, ::2]
    weight = torch.randn(14, 6)[::2]
    close(linear(x, weight), F.linear(x, weight))
    close(linear(x[:1].expand(4, 3, 6), weight), F.linear(x[:1].expand(4, 3, 6), weight))


def test_it_compiles_as_pytorchs_own():
    x, weight, bias = (tensor.detach() for tensor in problem((6, 5), 4))
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    close(compiled(x, weight, bias), F.linear(x, weight, bias))
