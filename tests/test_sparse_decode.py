"""sparse_decode on every backend: spmm with a bias, against what PyTorch users write by hand today."""

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, assert_spmm, integers, random, random_indices

import fastsparse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 3, 5, 4), (1, 1, 1, 1), (17, 9, 40, 33), (2, 0, 3, 5)])
def test_adds_the_bias(backend, dtype, shape):
    N, k, M, D = shape
    values, weight, bias = (random(*size, seed=1, dtype=dtype) for size in ((N, k), (M, D), (D,)))
    indices = random_indices(N, k, M, seed=2)
    assert_spmm(fastsparse.sparse_decode(values, indices, weight, bias), values, indices, weight, bias)
    assert torch.equal(
        fastsparse.sparse_decode(values, indices, weight), fastsparse.spmm(values, indices, weight)
    )


def test_leading_dimensions(backend):
    values, indices = random(2, 3, 4, seed=1), random_indices(6, 4, 9, seed=2).view(2, 3, 4)
    weight, bias = random(9, 5, seed=3), random(5, seed=4)
    out = fastsparse.sparse_decode(values, indices, weight, bias)
    assert out.shape == (2, 3, 5)
    assert_spmm(out.view(6, 5), values.view(6, 4), indices.view(6, 4), weight, bias)
    assert torch.equal(fastsparse.sparse_decode(values[1, 2], indices[1, 2], weight, bias), out[1, 2])


def test_equals_embedding_bag_forward_and_backward(backend):
    inputs = integers(20, 6, seed=1), integers(30, 9, seed=2), integers(9, seed=3)
    indices, upstream = random_indices(20, 6, 30, seed=4), integers(20, 9, seed=5)

    def run(decode):
        values, weight, bias = (tensor.clone().requires_grad_() for tensor in inputs)
        out = decode(values, weight, bias)
        out.backward(upstream)
        return out, values.grad, weight.grad, bias.grad

    ours = run(lambda values, weight, bias: fastsparse.sparse_decode(values, indices, weight, bias))
    bag = run(
        lambda values, weight, bias: (
            F.embedding_bag(indices, weight, per_sample_weights=values, mode="sum") + bias
        )
    )
    assert all(map(torch.equal, ours, bag))


def test_gradient_of_the_bias_alone(backend):
    bias = random(9, seed=1).requires_grad_()
    values, weight = random(20, 6, seed=2), random(30, 9, seed=3)
    fastsparse.sparse_decode(values, random_indices(20, 6, 30, seed=4), weight, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((9,), 20.0))
    assert values.grad is None
    assert weight.grad is None


def test_undoes_an_encoding_by_an_orthonormal_dictionary(backend):
    # With k = M = D and orthonormal rows, decoding the code of x gives x.
    dictionary = torch.linalg.qr(random(24, 24, seed=1, dtype=torch.float64)).Q
    x = random(10, 24, seed=2, dtype=torch.float64)
    code = fastsparse.topk_encode(x, dictionary, k=24, activation="none")
    torch.testing.assert_close(fastsparse.sparse_decode(*code, dictionary), x)


def test_all_zero_code_decodes_to_the_bias(backend):
    bias = random(9, seed=1)
    out = fastsparse.sparse_decode(
        torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.int64), random(5, 9, seed=2), bias
    )
    assert torch.equal(out, bias.expand(4, 9))
