"""Decoding by a cubic polynomial, against its definition on dense codes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastsparse import Ragged, polynomial_decode, sparse_decode, topk_encode

N, M, D, K = 9, 30, 11, 4
RANKS = (8, 5, 2)


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parts(dtype: torch.dtype = torch.float64) -> tuple:
    coefficients = tuple(tensor(D, rank, seed=10 + rank, dtype=dtype) for rank in RANKS)
    return tensor(M, RANKS[0], seed=5, dtype=dtype), coefficients, tensor(2, seed=6, dtype=dtype)


def code(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return topk_encode(tensor(N, M, dtype=dtype), torch.eye(M, dtype=dtype), k=K)


def textbook(dense: Tensor, weight: Tensor, coefficients: tuple, scales: Tensor, bias: Tensor) -> Tensor:
    a = dense @ weight
    terms = [a[:, :rank] ** p @ C.T for p, (C, rank) in enumerate(zip(coefficients, RANKS, strict=True), 1)]
    return bias + terms[0] + scales[0] * terms[1] + scales[1] * terms[2]


@pytest.mark.parametrize("ragged", [False, True])
def test_it_is_the_dense_definition(ragged: bool) -> None:
    values, indices = code()
    weight, coefficients, scales = parts()
    bias = tensor(D, seed=7)
    leaves = [values.clone(), weight, *coefficients, scales, bias]
    values, weight, *coefficients, scales, bias = (leaf.requires_grad_() for leaf in leaves)
    dense = torch.zeros(N, M, dtype=torch.float64).scatter_add(1, indices, values)
    offsets = torch.arange(0, N * K + 1, K) if ragged else None
    told = (values.flatten(), indices.flatten()) if ragged else (values, indices)
    out = polynomial_decode(*told, weight, coefficients, scales, bias, offsets)
    expected = textbook(dense, weight, coefficients, scales, bias)
    torch.testing.assert_close(out, expected)
    leaves = [values, weight, *coefficients, scales, bias]
    g = tensor(N, D, seed=8)
    torch.testing.assert_close(torch.autograd.grad(out, leaves, g), torch.autograd.grad(expected, leaves, g))


def test_derivatives() -> None:
    values, indices = code()
    weight, coefficients, scales = parts()
    leaves = [leaf[:4].clone().requires_grad_() if leaf is values else leaf.requires_grad_()
              for leaf in (values, weight, *coefficients, scales)]  # fmt: skip

    def decode(values: Tensor, weight: Tensor, C_1: Tensor, C_2: Tensor, C_3: Tensor, scales: Tensor):
        return polynomial_decode(values, indices[:4], weight, (C_1, C_2, C_3), scales)

    assert torch.autograd.gradcheck(decode, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(decode, leaves, fast_mode=True)


def test_without_powers_it_is_the_linear_decoder() -> None:
    values, indices = code()
    weight, coefficients, _ = parts()
    atoms = weight @ coefficients[0].T
    bias = tensor(D)
    out = polynomial_decode(values, indices, weight, coefficients, (0.0, 0), bias)
    torch.testing.assert_close(out, sparse_decode(values, indices, atoms, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    """Powers are carried in fp32: the cube of 60 is not in fp16."""
    weight, coefficients, scales = parts(dtype)
    indices = torch.zeros(1, 1, dtype=torch.int64)
    values = (60 / weight[0, 0]).reshape(1, 1)
    coefficients[2].mul_(1e-3)
    out = polynomial_decode(values, indices, weight, coefficients, scales)
    assert out.dtype == dtype
    dense = torch.zeros(1, M, dtype=torch.float64)
    dense[0, 0] = values
    wide = textbook(
        dense, weight.double(), [C.double() for C in coefficients], scales.double(), tensor(1) * 0
    )
    torch.testing.assert_close(out.double(), wide, rtol=50 * torch.finfo(dtype).eps, atol=0.5)


def test_leading_dimensions_empty_batches_and_autocast() -> None:
    values, indices = code(torch.float32)
    weight, coefficients, scales = parts(torch.float32)
    out = polynomial_decode(values.view(3, 3, K), indices.view(3, 3, K), weight, coefficients, scales)
    assert torch.equal(out.flatten(0, 1), polynomial_decode(values, indices, weight, coefficients, scales))
    assert polynomial_decode(values[:0], indices[:0], weight, coefficients, scales).shape == (0, D)
    none = Ragged(values.flatten()[:0], indices.flatten()[:0], torch.zeros(4, dtype=torch.int64))
    empty = polynomial_decode(none.values, none.indices, weight, coefficients, scales, None, none.offsets)
    assert not empty.any()
    assert empty.shape == (3, D)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = polynomial_decode(values, indices, weight, coefficients, scales)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), out.flatten(0, 1), rtol=0.1, atol=1.5)


REFUSED = {
    r"coefficients must be three matrices, got tuple": lambda W, C, s: (W, C[:2], s),
    r"coefficients must be three matrices, got Tensor": lambda W, C, s: (W, C[0], s),
    r"scales must be two numbers, got 3": lambda W, C, s: (W, C, (1, 2, 3)),
    r"R1 = 8 >= R2 >= R3 >= 1, got shapes \(11, 8\), \(11, 2\), \(11, 5\)": lambda W, C, s: (
        W, (C[0], C[2], C[1]), s,
    ),
    r"got shapes \(11, 8\), \(10, 5\), \(11, 2\)": lambda W, C, s: (W, (C[0], C[1][:10], C[2]), s),
    r"R1 = 7 >= R2": lambda W, C, s: (W[:, :7], C, s),
    r"coefficients\[1\] must have the dtype of values": lambda W, C, s: (W, (C[0], C[1].float(), C[2]), s),
}  # fmt: skip


@pytest.mark.parametrize(("message", "call"), REFUSED.items(), ids=range(len(REFUSED)))
def test_refusals(message: str, call: Callable) -> None:
    with pytest.raises(ValueError, match=f"^polynomial_decode: .*{message}"):
        polynomial_decode(*code(), *call(*parts()))


def test_more_refusals() -> None:
    values, indices = code()
    weight, coefficients, scales = parts()
    with pytest.raises(ValueError, match=r"^polynomial_decode: bias must have shape \(D,\) = \(11,\)"):
        polynomial_decode(values, indices, weight, coefficients, scales, tensor(D + 1))
    with pytest.raises(IndexError, match="must be in"):
        polynomial_decode(values, indices + M, weight, coefficients, scales)
    with pytest.raises(TypeError, match=r"coefficients\[0\] must be a torch.Tensor"):
        polynomial_decode(values, indices, weight, (1, 2, 3), scales)
