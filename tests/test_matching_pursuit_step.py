"""matching_pursuit_step on every backend: it is matching_pursuit's first step, and a loop of it the rest."""

import pytest
import torch
from backends import backend_names, host_backend_names, running
from oracle import DTYPES, LAYOUTS, assert_pursuit, integers, laid_out, random
from test_matching_pursuit import FORMS, problem

import fastsparse
from fastsparse import reference

forms = pytest.mark.parametrize(
    ("nonnegative", "normalized"),
    FORMS,
    ids=["signed", "signed-unit", "nonnegative", "nonnegative-unit"],
)
# (N, D, M), around the edges of vectors, row blocks and stripes, each of them once.
SHAPES = [
    *((1, 1, 17), (2, 2, 8), (17, 7, 65), (33, 16, 513), (3, 33, 129), (5, 257, 40)),
    *((129, 12, 2), (1025, 12, 70), (5, 13, 2049), (4, 9, 1), (0, 16, 32), (3, 0, 5)),
]


@pytest.fixture(params=backend_names(screened=True))
def backend(request) -> str:
    with running(request.param):
        yield request.param


def step(residual, dictionary, **options):
    """A step, held against exact scores."""
    value, index, after = fastsparse.matching_pursuit_step(residual, dictionary, **options)
    pursuit = value.unsqueeze(1), index.unsqueeze(1), after
    assert_pursuit(pursuit, residual, dictionary, k=1, **options)
    return value, index, after


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_shapes(backend, shape):
    nonnegative, normalized = FORMS[SHAPES.index(shape) % 4]
    step(*problem(*shape, normalized=normalized), nonnegative=nonnegative, normalized=normalized)


@pytest.mark.parametrize("of_residual", LAYOUTS)
def test_layouts(backend, of_residual):
    """Every two of layouts, dtypes and forms."""
    first = LAYOUTS.index(of_residual)
    for i, of_dictionary in enumerate(LAYOUTS):
        nonnegative, normalized = FORMS[first ^ i]
        residual, dictionary = problem(19, 37, 211, dtype=DTYPES[(i + first) % 4], normalized=normalized)
        residual, dictionary = laid_out(residual, of_residual), laid_out(dictionary, of_dictionary)
        step(residual, dictionary, nonnegative=nonnegative, normalized=normalized)


@pytest.mark.parametrize("name", host_backend_names(screened=True))
def test_blocks_of_rows_and_stripes_of_atoms(name):
    """More than one of each. Atoms of norm 4 and integer rows: all sums are exact."""
    residual, dictionary = integers(70, 16, seed=1), 2.0 * (random(2200, 16, seed=2) > 0) - 1
    right = reference.matching_pursuit_step(residual, dictionary)
    with running(name):
        found = fastsparse.matching_pursuit_step(residual.repeat(30, 1), dictionary)
    for mine, theirs in zip(found, right, strict=True):
        assert torch.equal(mine, theirs.repeat(30, *[1] * (theirs.dim() - 1)))


@forms
def test_a_loop_of_steps_is_a_pursuit(backend, nonnegative, normalized):
    """And so is its gradient. Integers in 4 dimensions: all sums are exact."""
    dtype = torch.float64 if nonnegative == normalized else torch.float32
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (30, 4), generator=generator).to(dtype)
    dictionary = (2.0 * torch.randint(0, 2, (11, 4), generator=generator) - 1).to(dtype)
    dictionary = dictionary / 2 if normalized else dictionary
    x[0], dictionary[3] = 0, 0  # nothing to take, and what never is
    options = {"nonnegative": nonnegative, "normalized": normalized}
    upstream, grads = random(30, 4, seed=3, dtype=dtype), []
    for looped in (True, False):
        leaves = x.clone().requires_grad_(), dictionary.clone().requires_grad_()
        if looped:
            residual, steps = leaves[0], []
            for _ in range(4):
                value, index, residual = fastsparse.matching_pursuit_step(residual, leaves[1], **options)
                steps.append((value, index))
            values, indices = (torch.stack(part, dim=1) for part in zip(*steps, strict=True))
        else:
            whole = fastsparse.matching_pursuit(*leaves, k=4, **options)
            assert torch.equal(values, whole.values)
            assert torch.equal(indices, whole.indices)
            assert torch.equal(residual, whole.residual)
            values, indices, residual = whole
        grads.append(torch.autograd.grad(((values + residual) * upstream).sum(), leaves))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("dtype", "scale", "of_atoms"),
    [
        (torch.float32, 1e-19, 1e-30),  # products with tiny and huge atoms count as any
        (torch.float32, 1e15, 1e25),
        (torch.float64, 1e-170, 1),  # the row's squares underflow
    ],
    ids=str,
)
def test_tiny_and_huge(backend, dtype, scale, of_atoms):
    x, dictionary = random(8, 40, seed=1, scale=scale, dtype=dtype), random(20, 40, seed=2, dtype=dtype)
    dictionary[1::2] *= of_atoms
    value, _, _ = step(x, dictionary)
    assert (value != 0).all()
