"""matching_pursuit_backward on the CPU, where rows are wide: its panels, in any number of threads."""

import pytest
import torch
from backends import host_backend_names, running
from oracle import random

from fastsparse import reference


def steps(N, D, M, k, *, dtype, normalized):
    """The op's arguments: what some steps left, of which every fourth slot was none."""
    generator = torch.Generator().manual_seed(0)
    dictionary = random(M, D, seed=1, dtype=torch.float64)
    if normalized:
        dictionary /= dictionary.norm(dim=1, keepdim=True)
    values = random(N, k, seed=2, dtype=dtype)
    values[:, ::4] = 0
    indices = torch.randint(0, M, (N, k), generator=generator).masked_fill(values == 0, 0)
    residual, d_values = random(N, D, seed=3, dtype=dtype), random(N, k, seed=4, dtype=dtype)
    return values, indices, residual, dictionary.to(dtype), d_values, random(N, D, seed=5, dtype=dtype)


@pytest.mark.parametrize("name", host_backend_names())
@pytest.mark.parametrize(
    ("dtype", "D", "normalized"),
    [
        (torch.float32, 129, True),
        (torch.float32, 512, False),
        (torch.bfloat16, 300, False),
        (torch.bfloat16, 512, True),
        (torch.float64, 300, True),
    ],
    ids=str,
)
def test_wide_rows(name, threads, dtype, D, normalized):
    arguments = steps(13, D, 30, 5, dtype=dtype, normalized=normalized)
    runs = []
    for count in (1, 5):  # panels narrow with it
        threads(count)
        with running(name):
            op = torch.ops.fastsparse.matching_pursuit_backward.default
            runs.append(op(*arguments, normalized, True, True))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    exact = reference.matching_pursuit_backward(
        *(tensor.double() if tensor.is_floating_point() else tensor for tensor in arguments),
        normalized,
        True,
        True,
    )
    for mine, theirs in zip(runs[0], exact, strict=True):
        accuracy = {torch.float32: 1e-5, torch.float64: 1e-13}.get(dtype, torch.finfo(dtype).eps)
        assert (mine.double() - theirs).abs().max() <= accuracy * theirs.abs().max()
