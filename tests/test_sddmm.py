"""sddmm on every backend: dot products of tokens with given latents only, and their gradients."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import DTYPES, LAYOUTS, assert_sddmm, integers, laid_out, random, random_indices, shapes
from strategies import codes, tensors

import fastsparse
from fastsparse import reference

# (N, k, M, D), around the edges of vectors and of row blocks.
SHAPES = [
    *shapes(
        (1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129),
        (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 129, 130),
        (130,),
        (1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 70, 127, 129, 257, 1023, 1025),
    ),
    *((N, 3, 40, 9) for N in (1025, 2049, 4097)),
    (0, 4, 9, 8),
    (0, 0, 0, 0),
    (3, 0, 5, 4),
    (3, 2, 5, 0),
    (1, 1, 1, 1),
]


def problem(N, k, M, D, dtype=torch.float32):
    return (
        random(N, D, seed=1, dtype=dtype),
        random(M, D, seed=2, dtype=dtype),
        random_indices(N, k, M, seed=3),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_shapes(backend, shape):
    inputs = problem(*shape)
    assert_sddmm(fastsparse.sddmm(*inputs), *inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 0, 5, 4), (3, 2, 5, 0), (17, 9, 40, 33), (65, 33, 129, 70)]
)
def test_dtypes(backend, dtype, shape):
    inputs = problem(*shape, dtype=dtype)
    out = fastsparse.sddmm(*inputs)
    assert_sddmm(out, *inputs)
    assert out.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("of_x", "of_weight"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_layouts(backend, dtype, of_x, of_weight):
    x, weight, indices = problem(19, 7, 53, 37, dtype)
    of_indices = LAYOUTS[LAYOUTS.index(of_x) - 1]
    laid = laid_out(x, of_x), laid_out(weight, of_weight), laid_out(indices, of_indices)
    assert_sddmm(fastsparse.sddmm(*laid), x, weight, indices)


def test_expanded_inputs(backend):
    x, weight, indices = problem(19, 7, 53, 37)
    for expanded in (
        (x[:1].expand(19, 37), weight, indices),
        (x[:, :1].expand(19, 37), weight, indices[:1].expand(19, 7)),
        (x, weight[:1].expand(53, 37), indices),
        (x, weight[:, :1].expand(53, 37), indices[:, :1].expand(19, 7)),
    ):
        assert_sddmm(fastsparse.sddmm(*expanded), *expanded)


def test_leading_dimensions(backend):
    x, weight, indices = problem(24, 7, 53, 5)
    flat = fastsparse.sddmm(x, weight, indices)
    assert torch.equal(
        fastsparse.sddmm(x.view(2, 3, 4, 5), weight, indices.view(2, 3, 4, 7)), flat.view(2, 3, 4, 7)
    )
    assert torch.equal(fastsparse.sddmm(x[3], weight, indices[3]), flat[3])
    assert fastsparse.sddmm(x[:0].view(0, 3, 5), weight, indices[:0].view(0, 3, 7)).shape == (0, 3, 7)


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-42])
def test_magnitudes(backend, scale):
    x, weight, indices = problem(9, 6, 30, 33)
    for inputs in ((x * scale, weight, indices), (x, weight * scale, indices)):
        assert_sddmm(fastsparse.sddmm(*inputs), *inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_are_carried_beyond_the_range_and_precision_of_halves(backend, dtype):
    indices = torch.zeros(1, 2, dtype=torch.int64)
    x = torch.tensor([[60000.0, 60000.0, -60000.0]], dtype=dtype)
    assert torch.equal(fastsparse.sddmm(x, torch.ones(1, 3, dtype=dtype), indices), x[:, :1].expand(1, 2))
    x = torch.ones(1, 129, dtype=dtype).index_fill(1, torch.tensor([0]), 256.0)
    assert fastsparse.sddmm(x, torch.ones(1, 129, dtype=dtype), indices).tolist() == [[384.0, 384.0]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite(backend, bad):
    x, weight, indices = problem(9, 6, 30, 33)
    x[2, 3] = bad
    weight[indices[4, 1], 5] = bad
    x[7, 32] = 0
    weight[indices[7, 0], 32] = bad  # 0 * inf is NaN
    out = fastsparse.sddmm(x, weight, indices)
    assert_sddmm(out, x, weight, indices)
    assert out[7, 0].isnan()


@pytest.mark.parametrize("offender", [7000, 40, -1, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("position", [(0, 0), (3, 1), (4, 4)])
def test_index_out_of_range(backend, offender, position):
    x, weight, indices = problem(5, 5, 40, 8)
    indices[position] = offender
    n, j = position
    message = rf"^sddmm: indices\[{n}, {j}\] must be in \[0, 40\), got {offender}$"
    with pytest.raises(IndexError, match=message):
        fastsparse.sddmm(x, weight, indices)


def test_repeated_and_threaded_runs_agree_bitwise(backend, threads):
    inputs = problem(600, 9, 80, 37)
    runs = []
    for count in (1, 2, 3, 4, 1):
        threads(count)
        runs.append(fastsparse.sddmm(*inputs))
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [9, 1056])
def test_a_score_does_not_depend_on_the_others(backend, dtype, D):
    if not backend.startswith(("triton", "cuda")):
        pytest.skip("only the GPU kernels promise it")
    x, weight, indices = problem(70, 9, 60, D, dtype)
    every = fastsparse.sddmm(x, weight, indices)
    for N, k in ((1, 9), (3, 1), (70, 2)):
        assert torch.equal(fastsparse.sddmm(x[:N], weight, indices[:N, :k]), every[:N, :k])


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_gradients_equal_the_differentiated_reference(backend, wanted):
    x, weight = integers(21, 8, seed=1), integers(30, 8, seed=2)
    indices = random_indices(21, 6, 30, seed=3, distinct=False)
    upstream = integers(21, 6, seed=4)

    def gradients(sddmm):
        leaves = [leaf.clone().requires_grad_(flag) for leaf, flag in zip((x, weight), wanted, strict=True)]
        sddmm(*leaves, indices).backward(upstream)
        return [leaf.grad for leaf in leaves]

    for mine, theirs in zip(gradients(fastsparse.sddmm), gradients(reference.sddmm), strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)


@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_any_numbers(backend, data, dtype):
    _, indices, M, D = data.draw(codes())
    x, weight = (data.draw(tensors(shape)).to(dtype) for shape in ((len(indices), D), (M, D)))
    assert_sddmm(fastsparse.sddmm(x, weight, indices), x, weight, indices)


@given(code=codes(), seed=st.integers(0, 2**31))
def test_gathers_the_dense_product(backend, code, seed):
    _, indices, M, D = code
    x, weight = integers(len(indices), D, seed=seed), integers(M, D, seed=seed + 1)
    assert torch.equal(fastsparse.sddmm(x, weight, indices), (x @ weight.T).gather(1, indices))
