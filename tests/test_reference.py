"""The references themselves, against what PyTorch users write by hand and what the papers state."""

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, random

from fastsparse import reference

# Scores of three tokens for five latents, written out.
SCORES = torch.tensor(
    [[3.0, -7.0, 5.0, 5.0, -1.0], [-1.0, -2.0, -3.0, -4.0, -5.0], [0.0, 0.0, 1.0, 0.0, 0.0]]
)


@pytest.mark.parametrize(
    ("options", "values", "indices"),
    [
        ({"activation": "relu"}, [[5, 5, 3], [0, 0, 0], [1, 0, 0]], [[2, 3, 0], [0, 1, 2], [2, 0, 1]]),
        ({"activation": "none"}, [[5, 5, 3], [-1, -2, -3], [1, 0, 0]], [[2, 3, 0], [0, 1, 2], [2, 0, 1]]),
        ({"activation": "abs"}, [[-7, 5, 5], [-5, -4, -3], [1, 0, 0]], [[1, 2, 3], [4, 3, 2], [2, 0, 1]]),
        (
            {"activation": "none", "latent_scale": torch.tensor([2.0, 1.0, 1.0, 1.0, -10.0])},
            [[-1, 3, 5], [-5, -1, -2], [1, 0, 0]],
            [[4, 0, 2], [4, 0, 1], [2, 0, 1]],
        ),
        (
            {"activation": "none", "latent_mask": torch.tensor([True, True, False, False, True])},
            [[3, -1, -7], [-1, -2, -5], [0, 0, 0]],
            [[0, 4, 1], [0, 1, 4], [0, 1, 4]],
        ),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_encode_by_hand(options, values, indices, dtype):
    options = {
        name: option.to(dtype) if isinstance(option, torch.Tensor) and option.is_floating_point() else option
        for name, option in options.items()
    }
    eye = torch.eye(5, dtype=dtype)
    got = reference.topk_encode(SCORES.to(dtype), eye, None, 3, **options)
    assert got[0].tolist() == values
    assert got[0].dtype == dtype
    assert got[1].tolist() == indices


def test_topk_encode_puts_nan_first():
    scores = torch.tensor([[1.0, torch.nan, torch.inf, -torch.inf, torch.nan]])
    values, indices = reference.topk_encode(torch.ones(1, 1), torch.zeros(5, 1), scores[0], 5, "none")
    assert indices.tolist() == [[1, 4, 2, 0, 3]]
    assert torch.equal(values.nan_to_num(7.0), scores[:, indices[0]].nan_to_num(7.0))


def test_topk_encode_is_topk_of_relu_of_linear():
    x, weight, bias = (random(*shape, seed=1, dtype=torch.float64) for shape in ((40, 16), (300, 16), (300,)))
    dense = torch.topk(torch.relu(F.linear(x, weight, bias)), 9)
    values, indices = reference.topk_encode(x, weight, bias, 9)
    torch.testing.assert_close(values, dense.values)
    assert torch.equal(indices, dense.indices)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matching_pursuit_by_hand(dtype):
    dictionary = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0], [-4.0, 4.0]], dtype=dtype)
    x = torch.tensor([[3.0, 1.0], [0.0, 0.0], [-5.0, 3.0]], dtype=dtype)
    # Scores of the third token: 5, 3, 0 and 32 / sqrt(32) = 5.66; then -1, -1, 0, 0; then 0, -1, 0, -0.7.
    signed = [[1.5, 1, 0], [0, 0, 0], [1, -0.5, -1]], [[0, 1, 0], [0, 0, 0], [3, 0, 1]], [[0, 0]] * 3
    positive = (
        [[1.5, 1, 0], [0, 0, 0], [1, 0, 0]],
        [[0, 1, 0], [0, 0, 0], [3, 0, 0]],
        [[0, 0], [0, 0], [-1, -1]],
    )
    near = (
        [[1.5, 0, 0], [0, 0, 0], [1, -0.5, 0]],
        [[0, 0, 0], [0, 0, 0], [3, 0, 0]],
        [[0, 1], [0, 0], [0, -1]],
    )
    for options, right in (({}, signed), ({"nonnegative": True}, positive), ({"tol": 1.25}, near)):
        values, indices, residual = reference.matching_pursuit(x, dictionary, 3, **options)
        assert indices.tolist() == right[1]
        torch.testing.assert_close(values, torch.tensor(right[0], dtype=dtype))
        torch.testing.assert_close(residual, torch.tensor(right[2], dtype=dtype), atol=1e-6, rtol=0)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("nonnegative", [False, True])
def test_matching_pursuit_goes_back_as_pytorch_would(nonnegative, normalized):
    """The gradient that rebuilds residuals, against PyTorch's own, which remembers them all."""
    x, dictionary = random(20, 6, seed=1, dtype=torch.float64), random(15, 6, seed=2, dtype=torch.float64)
    dictionary = F.normalize(dictionary, dim=1) if normalized else dictionary
    leaves = x.requires_grad_(), dictionary.requires_grad_()
    values, indices, residual = reference.matching_pursuit(*leaves, 9, 0.5, nonnegative, normalized)
    assert (values == 0).any()
    upstream = random(20, 9, seed=3, dtype=torch.float64), random(20, 6, seed=4, dtype=torch.float64)
    right = torch.autograd.grad((values, residual), leaves, upstream)
    state = [tensor.detach() for tensor in (values, indices, residual, dictionary)]
    ours = reference.matching_pursuit_backward(*state, *upstream, normalized, True, True)
    torch.testing.assert_close(ours, right)
