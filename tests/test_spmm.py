"""spmm on every backend: a sparse code times a dense matrix, and its gradients."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import DTYPES, LAYOUTS, assert_spmm, integers, laid_out, random, random_indices, shapes
from strategies import codes, tensors

import fastsparse
from fastsparse import reference

# (N, k, M, D), around the edges of vectors, of unrolled columns and of row blocks.
SHAPES = [
    *shapes(
        (1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129),
        (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 129, 130),
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
        random(N, k, seed=1, dtype=dtype),
        random_indices(N, k, M, seed=2),
        random(M, D, seed=3, dtype=dtype),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_shapes(backend, shape):
    inputs = problem(*shape)
    assert_spmm(fastsparse.spmm(*inputs), *inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 0, 5, 4), (17, 9, 40, 33), (65, 33, 129, 70), (4, 16, 300, 257)]
)
def test_dtypes(backend, dtype, shape):
    inputs = problem(*shape, dtype=dtype)
    out = fastsparse.spmm(*inputs)
    assert_spmm(out, *inputs)
    assert out.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("of_code", "of_weight"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_layouts(backend, dtype, of_code, of_weight):
    values, indices, weight = problem(19, 7, 53, 37, dtype)
    # The two halves of the code needn't share a layout.
    of_indices = LAYOUTS[LAYOUTS.index(of_code) - 1]
    laid = laid_out(values, of_code), laid_out(indices, of_indices), laid_out(weight, of_weight)
    assert_spmm(fastsparse.spmm(*laid), values, indices, weight)


def test_expanded_inputs(backend):
    values, indices, weight = problem(19, 7, 53, 37)
    for expanded in (
        (values[:1].expand(19, 7), indices, weight),
        (values[:, :1].expand(19, 7), indices[:1].expand(19, 7), weight),
        (values, indices, weight[:1].expand(53, 37)),
        (values, indices, weight[:, :1].expand(53, 37)),
    ):
        assert_spmm(fastsparse.spmm(*expanded), *expanded)


def test_leading_dimensions(backend):
    values, indices, weight = problem(24, 7, 53, 5)
    flat = fastsparse.spmm(values, indices, weight)
    assert torch.equal(
        fastsparse.spmm(values.view(2, 3, 4, 7), indices.view(2, 3, 4, 7), weight), flat.view(2, 3, 4, 5)
    )
    assert torch.equal(fastsparse.spmm(values[3], indices[3], weight), flat[3])
    assert fastsparse.spmm(values[:0].view(0, 3, 7), indices[:0].view(0, 3, 7), weight).shape == (0, 3, 5)


def test_repeated_indices_add_up(backend):
    values, weight = integers(11, 9, seed=1), integers(4, 21, seed=2)
    indices = random_indices(11, 9, 4, seed=3, distinct=False)
    dense = torch.zeros(11, 4).scatter_add(1, indices, values)
    assert torch.equal(fastsparse.spmm(values, indices, weight), dense @ weight)


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-42])
def test_magnitudes(backend, scale):
    values, indices, weight = problem(9, 6, 30, 33)
    for inputs in ((values * scale, indices, weight), (values, indices, weight * scale)):
        assert_spmm(fastsparse.spmm(*inputs), *inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_are_carried_beyond_the_range_and_precision_of_halves(backend, dtype):
    # 60000 + 60000 - 60000 overflows fp16; 256 + 128 ones is lost in bf16.
    values = torch.cat((torch.full((1, 2), 60000.0), torch.full((1, 1), -60000.0)), 1).to(dtype)
    big = fastsparse.spmm(values, torch.tensor([[0, 0, 0]]), torch.ones(1, 3, dtype=dtype))
    assert torch.equal(big, values[:, :1].expand(1, 3))
    values = torch.ones(1, 129, dtype=dtype).index_fill(1, torch.tensor([0]), 256.0)
    assert fastsparse.spmm(
        values, torch.zeros(1, 129, dtype=torch.int64), torch.ones(1, 2, dtype=dtype)
    ).tolist() == [[384.0, 384.0]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite(backend, bad):
    values, indices, weight = problem(9, 6, 30, 33)
    values[2, 3] = bad
    weight[indices[4, 1], 5] = bad
    values[7, 0] = 0
    weight[indices[7, 0], 8] = bad  # 0 * inf is NaN
    out = fastsparse.spmm(values, indices, weight)
    assert_spmm(out, values, indices, weight)
    assert out[7, 8].isnan()


@pytest.mark.parametrize("hot", [False, True])
def test_a_weight_beyond_the_cache_with_every_atom_used_often(backend, hot):
    # Done by panels of columns on the CPU, unless a few hot atoms make up most of the code.
    values, weight = random(2600, 8, seed=1), random(4200, 1030, seed=3)
    indices = random_indices(2600, 8, 40 if hot else 4200, seed=2, distinct=False)
    out, some = fastsparse.spmm(values, indices, weight), slice(None, None, 97)
    assert_spmm(out[some], values[some], indices[some], weight)


@pytest.mark.parametrize("offender", [7000, 40, -1, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("position", [(0, 0), (3, 1), (4, 4)])
def test_index_out_of_range(backend, offender, position):
    values, indices, weight = problem(5, 5, 40, 8)
    indices[position] = offender
    n, j = position
    message = rf"^spmm: indices\[{n}, {j}\] must be in \[0, 40\), got {offender}$"
    with pytest.raises(IndexError, match=message):
        fastsparse.spmm(values, indices, weight)


def test_repeated_and_threaded_runs_agree_bitwise(backend, threads):
    inputs = problem(600, 9, 80, 37)
    runs = []
    for count in (1, 2, 3, 4, 1):
        threads(count)
        runs.append(fastsparse.spmm(*inputs))
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [9, 256])
def test_a_token_does_not_depend_on_the_others(backend, dtype, D):
    if backend == "reference":
        pytest.skip("only the kernels promise it: the reference's sum is PyTorch's")
    values, indices, weight = problem(200, 37, 60, D, dtype)
    every = fastsparse.spmm(values, indices, weight)
    for N in (1, 3, 40):
        assert torch.equal(fastsparse.spmm(values[:N], indices[:N], weight), every[:N])


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_gradients_equal_the_differentiated_reference(backend, wanted):
    values, indices, weight = (
        integers(21, 6, seed=1),
        random_indices(21, 6, 30, seed=2, distinct=False),
        integers(30, 8, seed=3),
    )
    upstream = integers(21, 8, seed=4)

    def gradients(spmm):
        leaves = [
            leaf.clone().requires_grad_(flag) for leaf, flag in zip((values, weight), wanted, strict=True)
        ]
        spmm(leaves[0], indices, leaves[1]).backward(upstream)
        return [leaf.grad for leaf in leaves]

    for mine, theirs in zip(gradients(fastsparse.spmm), gradients(reference.spmm), strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)


@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_any_numbers(backend, data, dtype):
    values, indices, M, D = data.draw(codes())
    values, weight = values.to(dtype), data.draw(tensors((M, D))).to(dtype)
    assert_spmm(fastsparse.spmm(values, indices, weight), values, indices, weight)


@given(code=codes(elements=st.integers(-8, 8)))
def test_identity_scatters(backend, code):
    values, indices, M, _ = code
    dense = torch.zeros(len(values), M).scatter_add(1, indices, values)
    assert torch.equal(fastsparse.spmm(values, indices, torch.eye(M)), dense)


@given(code=codes(elements=st.integers(-8, 8)), seed=st.integers(0, 2**31))
def test_adjoint_of_sddmm_and_spmm_t(backend, code, seed):
    # <S W, y> = <S, sddmm(y, W)> = <W, S^T y>, exactly, in integers.
    values, indices, M, D = code
    weight, y = integers(M, D, seed=seed), integers(len(values), D, seed=seed + 1)
    product = (fastsparse.spmm(values, indices, weight) * y).sum()
    assert product == (values * fastsparse.sddmm(y, weight, indices)).sum()
    assert product == (weight * fastsparse.spmm_t(values, indices, y, M)).sum()
