"""spmm_t on every backend: a transposed sparse code times dense rows, reproducibly, and its gradients."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import DTYPES, LAYOUTS, assert_spmm_t, integers, laid_out, random, random_indices, shapes
from strategies import codes, tensors

import fastsparse
from fastsparse import reference

# (N, k, M, D), around the edges of vectors, of row blocks and of split latents.
SHAPES = [
    *shapes(
        (1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129),
        (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 129, 130),
        (130,),
        (1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 70, 127, 129, 257, 1023, 1025),
    ),
    *((N, 3, 40, 9) for N in (1025, 2049, 4097)),
    *((50, 3, M, 9) for M in (3, 4, 511, 513, 1024, 2049, 20000)),
    *((N, 1, 1, 5) for N in (127, 128, 129, 511, 513, 1023, 1025, 4097, 20000)),  # all to one latent
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
        random(N, D, seed=3, dtype=dtype),
        M,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_shapes(backend, shape):
    inputs = problem(*shape)
    assert_spmm_t(fastsparse.spmm_t(*inputs), *inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 0, 5, 4), (17, 9, 40, 33), (65, 33, 129, 70), (900, 4, 7, 257)]
)
def test_dtypes(backend, dtype, shape):
    inputs = problem(*shape[:2], max(shape[1:3]), shape[3], dtype=dtype)
    out = fastsparse.spmm_t(*inputs)
    assert_spmm_t(out, *inputs)
    assert out.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("of_code", "of_x"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_layouts(backend, dtype, of_code, of_x):
    values, indices, x, M = problem(19, 7, 53, 37, dtype)
    of_indices = LAYOUTS[LAYOUTS.index(of_code) - 1]
    laid = laid_out(values, of_code), laid_out(indices, of_indices), laid_out(x, of_x)
    assert_spmm_t(fastsparse.spmm_t(*laid, M), values, indices, x, M)


def test_expanded_inputs(backend):
    values, indices, x, M = problem(19, 7, 53, 37)
    for expanded in (
        (values[:1].expand(19, 7), indices, x),
        (values[:, :1].expand(19, 7), indices[:1].expand(19, 7), x),
        (values, indices, x[:1].expand(19, 37)),
        (values, indices[:, :1].expand(19, 7), x[:, :1].expand(19, 37)),
    ):
        assert_spmm_t(fastsparse.spmm_t(*expanded, M), *expanded, M)


def test_leading_dimensions(backend):
    values, indices, x, M = problem(24, 7, 53, 5)
    flat = fastsparse.spmm_t(values, indices, x, M)
    shaped = fastsparse.spmm_t(values.view(2, 3, 4, 7), indices.view(2, 3, 4, 7), x.view(2, 3, 4, 5), M)
    assert torch.equal(shaped, flat)
    one = fastsparse.spmm_t(values[3], indices[3], x[3], M)
    assert torch.equal(one, fastsparse.spmm_t(values[3:4], indices[3:4], x[3:4], M))
    empty = fastsparse.spmm_t(values[:0].view(0, 3, 7), indices[:0].view(0, 3, 7), x[:0].view(0, 3, 5), M)
    assert torch.equal(empty, torch.zeros(M, 5))


def test_unused_latents_are_zero(backend):
    values, indices, x = random(40, 3, seed=1), random_indices(40, 3, 10, seed=2), random(40, 21, seed=3)
    out = fastsparse.spmm_t(values, 5 * indices + 2, x, 60)
    assert torch.equal(out[torch.arange(60) % 5 != 2], torch.zeros(48, 21))
    unused = torch.arange(60) % 5 == 2
    assert torch.equal(out[unused], fastsparse.spmm_t(values, indices, x, 12))


@pytest.mark.parametrize("hot", [0, 3, 6])
def test_one_latent_takes_nearly_all(backend, hot):
    indices = random_indices(5000, 4, 7, seed=1, distinct=False)
    indices[:, 0] = hot
    indices[:4900, 1:3] = hot
    values, x = random(5000, 4, seed=2), random(5000, 17, seed=3)
    assert_spmm_t(fastsparse.spmm_t(values, indices, x, 7), values, indices, x, 7)


@pytest.mark.parametrize("D", [1, 2, 8])
@pytest.mark.parametrize("seed", range(4))
def test_latents_of_about_whole_pieces(backend, D, seed):
    # Lists that end at, before and after the places where kernels cut them, behind each other in every order.
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor([0, 1, 255, 256, 257, 511, 512, 513, 0, 767, 768, 1025])
    latents = torch.randperm(12, generator=generator).repeat_interleave(counts)
    indices = latents[torch.randperm(len(latents), generator=generator)].unsqueeze(1)
    values, x = integers(len(latents), 1, seed=seed), integers(len(latents), D, seed=seed + 1)
    exact = torch.zeros(12, D).index_add_(0, indices[:, 0], values * x)
    assert torch.equal(fastsparse.spmm_t(values, indices, x, 12), exact)


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-42])
def test_magnitudes(backend, scale):
    values, indices, x, M = problem(40, 6, 30, 33)
    for inputs in ((values * scale, indices, x, M), (values, indices, x * scale, M)):
        assert_spmm_t(fastsparse.spmm_t(*inputs), *inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N", [129, 3000])
def test_sums_are_carried_beyond_the_range_and_precision_of_halves(backend, dtype, N):
    indices = torch.zeros(N, 1, dtype=torch.int64)
    ones, x = torch.ones(N, 1, dtype=dtype), torch.zeros(N, 2, dtype=dtype)
    x[:3] = torch.tensor([60000.0, 60000.0, -60000.0], dtype=dtype).unsqueeze(1)
    assert torch.equal(fastsparse.spmm_t(ones, indices, x, 1), x[:1])
    x = torch.ones(N, 2, dtype=dtype)
    x[0] = 256
    exact = torch.full((1, 2), 255.0 + N).to(dtype)
    assert torch.equal(fastsparse.spmm_t(ones, indices, x, 1), exact)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite(backend, bad):
    values, indices, x, M = problem(9, 6, 30, 33)
    values[2, 3] = bad
    x[4, 5] = bad
    values[7, 0] = 0
    x[7, 8] = bad  # 0 * inf is NaN
    out = fastsparse.spmm_t(values, indices, x, M)
    assert_spmm_t(out, values, indices, x, M)
    assert out[indices[7, 0], 8].isnan()


@pytest.mark.parametrize("offender", [7000, 40, -1, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("position", [(0, 0), (3, 1), (4, 4)])
def test_index_out_of_range(backend, offender, position):
    values, indices, x, M = problem(5, 5, 40, 8)
    indices[position] = offender
    n, j = position
    message = rf"^spmm_t: indices\[{n}, {j}\] must be in \[0, 40\), got {offender}$"
    with pytest.raises(IndexError, match=message):
        fastsparse.spmm_t(values, indices, x, M)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("skewed", [False, True])
def test_repeated_and_threaded_runs_agree_bitwise(backend, threads, dtype, skewed):
    if backend in ("reference", "registered"):
        pytest.skip("the kernels alone promise it: the reference is PyTorch's index_add")
    indices = random_indices(3000, 9, 80, seed=1)
    if skewed:
        indices[:, 0] = 5
        indices[:, 1:4] //= 20
    values, x = random(3000, 9, seed=2, dtype=dtype), random(3000, 37, seed=3, dtype=dtype)
    runs = []
    for count in (1, 2, 3, 4, 1):
        threads(count)
        runs.append(fastsparse.spmm_t(values, indices, x, 80))
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_gradients_equal_the_differentiated_reference(backend, wanted):
    values, x = integers(21, 6, seed=1), integers(21, 8, seed=2)
    indices = random_indices(21, 6, 30, seed=3, distinct=False)
    upstream = integers(30, 8, seed=4)

    def gradients(spmm_t):
        leaves = [leaf.clone().requires_grad_(flag) for leaf, flag in zip((values, x), wanted, strict=True)]
        spmm_t(leaves[0], indices, leaves[1], 30).backward(upstream)
        return [leaf.grad for leaf in leaves]

    for mine, theirs in zip(gradients(fastsparse.spmm_t), gradients(reference.spmm_t), strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)


@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_any_numbers(backend, data, dtype):
    values, indices, M, D = data.draw(codes())
    values, x = values.to(dtype), data.draw(tensors((len(values), D))).to(dtype)
    assert_spmm_t(fastsparse.spmm_t(values, indices, x, M), values, indices, x, M)


@given(code=codes(elements=st.integers(-8, 8)), seed=st.integers(0, 2**31), data=st.data())
def test_order_of_tokens_and_slots_is_immaterial(backend, code, seed, data):
    values, indices, M, D = code
    N, k = values.shape
    x = integers(N, D, seed=seed)
    tokens = torch.tensor(data.draw(st.permutations(range(N))), dtype=torch.int64)
    slots = torch.tensor(data.draw(st.permutations(range(k))), dtype=torch.int64)
    shuffled = values[tokens][:, slots], indices[tokens][:, slots], x[tokens]
    out = fastsparse.spmm_t(values, indices, x, M)
    assert torch.equal(fastsparse.spmm_t(*shuffled, M), out)
    dense = torch.zeros(N, M).scatter_add(1, indices, values)
    assert torch.equal(out, dense.T @ x)
