"""Jumps: their values, and pseudo-derivatives against the formulas, against expectations and edge cases."""

import math

import pytest
import torch
from torch import Tensor

import fastsparse

H = 0.5


def textbook(values: Tensor, threshold: Tensor, d_activation: Tensor, d_gate: Tensor, ste: bool):
    """What jump returns, and the gradients to values and threshold, by arXiv 2407.14435."""
    gate = (values > threshold).to(values.dtype)
    band = ((values - threshold) / H).abs().lt(0.5).to(values.dtype)
    d_threshold = -(threshold / H) * band * d_activation - band / H * d_gate
    return values * gate, gate, gate * d_activation - (d_threshold if ste else 0), d_threshold


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ste_to_input", [False, True])
def test_values_and_gradients_are_the_formulas(dtype: torch.dtype, ste_to_input: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values, d_activation, d_gate = (torch.randn(50, 7, generator=generator).to(dtype) for _ in range(3))
    threshold = (torch.arange(7) / 8).to(dtype)  # so that what follows is exact
    values[0], values[1] = threshold, threshold + H / 2
    leaves = values.requires_grad_(), threshold.expand(50, 7).clone().requires_grad_()
    out = fastsparse.jump(*leaves, H, ste_to_input=ste_to_input)
    found = torch.autograd.grad(out, leaves, (d_activation, d_gate))
    expected = textbook(*(leaf.detach() for leaf in leaves), d_activation, d_gate, ste_to_input)
    torch.testing.assert_close((*out, *found), expected)
    assert not out[1][0].any()
    assert not found[1][1].any()
    shared = threshold.clone().requires_grad_()
    again = fastsparse.jump(values, shared, H, ste_to_input=ste_to_input)
    (summed,) = torch.autograd.grad(again, shared, (d_activation, d_gate))
    torch.testing.assert_close(summed.double(), expected[3].double().sum(0), atol=0.1, rtol=0.01)


def test_the_estimate_is_the_derivative_of_the_expected_loss() -> None:
    """Of ``(x - f)^2 + c gate`` with z standard normal and x twice that, and noise: it is known exactly.

    At z = theta the loss jumps by ``theta^2 - 4 theta^2 + c`` in the mean, where its density is phi(theta).
    """
    N, theta, cost, h = 2**21, 0.7, 0.4, 0.05
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, N, generator=generator, dtype=torch.float64)
    x = 2 * z + noise
    at_samples = torch.full_like(z, theta).requires_grad_()
    activation, gate = fastsparse.jump(z, at_samples, h)
    (estimates,) = torch.autograd.grad(((x - activation).square() + cost * gate).sum(), at_samples)
    expected = (3 * theta**2 - cost) * math.exp(-(theta**2) / 2) / math.sqrt(2 * math.pi)
    error = estimates.std().item() / math.sqrt(N)
    assert abs(estimates.mean().item() - expected) < 4 * error
    assert 4 * error < 0.05 * abs(expected)


def test_what_is_not_finite() -> None:
    inf, nan = torch.inf, torch.nan
    values = torch.tensor([nan, inf, inf, -inf, 1.0, 1.0, nan], requires_grad=True)
    threshold = torch.tensor([0.5, 0.5, inf, 0.5, inf, -inf, inf], requires_grad=True)
    activation, gate = fastsparse.jump(values, threshold, 1.0, ste_to_input=True)
    torch.testing.assert_close(activation, torch.tensor([nan, inf, 0, 0, 0, 1, nan]), equal_nan=True)
    assert gate.tolist() == [1, 1, 0, 0, 0, 1, 1]
    found = torch.autograd.grad((activation.sum() + gate.sum()), (values, threshold))
    assert found[0].tolist() == gate.tolist()
    assert not found[1].any()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_transforms() -> None:
    """Tangents are the gradients' transpose, second derivatives those with gate and band constant."""
    values = torch.linspace(-1, 2, 31, dtype=torch.float64)
    threshold = torch.full_like(values, 0.52)

    def function(*inputs: Tensor) -> Tensor:
        return torch.cat(fastsparse.jump(*inputs, H, ste_to_input=True))

    forward = torch.func.jacfwd(function, argnums=(0, 1))(values, threshold)
    torch.testing.assert_close(forward, torch.func.jacrev(function, argnums=(0, 1))(values, threshold))

    def cubed(threshold: Tensor) -> Tensor:
        return (fastsparse.jump(values, threshold, H)[0] ** 3).sum()

    threshold = threshold.requires_grad_()
    (first,) = torch.autograd.grad(cubed(threshold), threshold, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), threshold)
    f = torch.where(values > 0.52, values, 0)
    band = (values - 0.52).abs() < H / 2
    # of -K / h theta 3 f^2, whose f has the pseudo-derivative too
    expected = -3 * f**2 / H + 0.52 / H * 6 * f * 0.52 / H
    torch.testing.assert_close(second, torch.where(band, expected, 0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": [1.0]}, TypeError, "values must be a torch.Tensor, got list"),
        ({"threshold": torch.ones(3).double()}, ValueError, "threshold must have the dtype of values"),
        ({"threshold": torch.ones(2)}, ValueError, r"threshold must broadcast .* \(4, 3\), got shape \(2,\)"),
        ({"bandwidth": 0.0}, ValueError, "bandwidth must be above 0, got bandwidth=0.0"),
        ({"bandwidth": -1.0}, ValueError, "bandwidth must be finite and at least 0, got bandwidth=-1.0"),
        ({"bandwidth": "1"}, TypeError, "bandwidth must be a float, got '1' of type str"),
        ({"ste_to_input": 1}, TypeError, "ste_to_input must be a bool, got 1 of type int"),
    ],
)
def test_refusals(change: dict, error: type, message: str) -> None:
    arguments = {"values": torch.ones(4, 3), "threshold": torch.ones(3), "bandwidth": 0.1} | change
    with pytest.raises(error, match=f"^jump: {message}"):
        fastsparse.jump(**arguments)
