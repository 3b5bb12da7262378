"""What linear_recurrence in Triton promises beyond the op tests."""

import pytest
import torch
from backends import missing, running

import fastsparse

pytest.importorskip("triton")

BACKEND = "triton-gpu" if torch.cuda.is_available() else "triton-interpreted"
forms = pytest.mark.parametrize("pairs", [False, True], ids=["channels", "pairs"])
directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


@pytest.fixture(autouse=True)
def _in_triton():
    if (reason := missing(BACKEND)) is not None:
        pytest.skip(reason)
    with running(BACKEND):
        yield


@forms
@directions
def test_factors_whose_product_overflows_on_the_way_alone(reverse, pairs):
    """Neither a state nor the product of all is large; steps that some programs join first are."""
    factors = torch.tensor([1e-30, 1e25, 1e25, 1e-30])
    for T in (4, 100):
        a = torch.ones(1, T, 3)
        a[0, :4] = factors[:, None]
        a = a.flip(1) if reverse else a
        b, h0 = torch.zeros(1, T, 3), torch.tensor([[1.0, 0.0, -2.0]])
        if pairs:
            a = a[:, :, None, None] * torch.eye(2)[:, :, None]
            b, h0 = b.unsqueeze(2).expand(-1, -1, 2, -1), h0.unsqueeze(1).expand(-1, 2, -1)
        h = fastsparse.linear_recurrence(a, b, h0, reverse=reverse)
        states = factors.double().cumprod(0)
        states = torch.cat((states, states[-1:].expand(T - 4)))
        states = (states.flip(0) if reverse else states).view(-1, *(1,) * (h.dim() - 2))
        torch.testing.assert_close(h[0].double(), states * h0[0].double(), rtol=1e-6, atol=0)


@forms
@directions
def test_bounds_that_nobody_checked_lead_nowhere_outside(reverse, pairs):
    """On a GPU they are not read: the interpreter raises where memory that isn't the kernel's is."""
    if BACKEND != "triton-interpreted":
        pytest.skip("only the interpreter checks addresses")
    a, b = torch.ones(1, 10, *(2, 2) * pairs, 3), torch.ones(1, 10, *(2,) * pairs, 3)
    for bounds in map(torch.tensor, ([0, 5, 99], [-7, 4, 10], [0, 8, 3], [50, 60, 70])):
        torch.ops.fastsparse.linear_recurrence.default(a, b, None, reverse, bounds)
        h0 = b[0, :2]
        backward = torch.ops.fastsparse.linear_recurrence_backward.default
        backward(a, h0, reverse, bounds, b, b, True, True, True)
