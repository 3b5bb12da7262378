"""PolyNorm and PolyReLU: their ops with coefficients to learn."""

import re

import pytest
import torch
from oracle import random

import fastsparse
from fastsparse.nn import PolyNorm, PolyReLU

modules = pytest.mark.parametrize("module", [PolyNorm, PolyReLU])


@modules
def test_a_module_is_its_op(module):
    activation, x = module(), random(3, 4, 7, seed=1)
    assert [tuple(parameter.shape) for parameter in activation.parameters()] == [(3,), (1,)]
    op = fastsparse.poly_norm if module is PolyNorm else fastsparse.poly_relu
    assert torch.equal(activation(x), op(x, torch.full((3,), 1 / 3), torch.zeros(1)))
    activation(x).sum().backward()
    assert all(parameter.grad.any() for parameter in activation.parameters())


@modules
def test_parameters_come_back(module):
    activation, other, x = module(dtype=torch.float64), module(dtype=torch.float64), random(5, 7, seed=1)
    with torch.no_grad():
        activation.weight.copy_(random(3, seed=2))
        activation.bias.copy_(random(1, seed=3))
    other.load_state_dict(activation.state_dict())
    assert torch.equal(other(x.double()), activation(x.double()))
    other.reset_parameters()
    assert torch.equal(other(x.double()), module(dtype=torch.float64)(x.double()))


@modules
def test_under_autocast(module):
    x = random(5, 7, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        y = module()(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), module()(x), atol=0.05, rtol=0.02)


def test_eps():
    x = random(5, 7, seed=1, scale=0.1)
    assert torch.equal(
        PolyNorm(0.5)(x), fastsparse.poly_norm(x, torch.full((3,), 1 / 3), torch.zeros(1), 0.5)
    )
    assert repr(PolyNorm(0.5)) == "PolyNorm(eps=0.5)"
    with pytest.raises(
        ValueError, match=re.escape("PolyNorm: eps must be finite and at least 0, got eps=-1")
    ):
        PolyNorm(-1)
