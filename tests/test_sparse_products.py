"""spmm, sddmm, spmm_t, sparse_decode on every backend: products with a sparse code, and their gradients."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    DTYPES,
    LAYOUTS,
    assert_sddmm,
    assert_spmm,
    assert_spmm_t,
    integers,
    laid_out,
    random,
    random_indices,
    shapes,
)
from strategies import codes, tensors
from torch import Tensor

import fastsparse
from fastsparse import reference


@dataclass(frozen=True)
class Product:
    """An op: the names of its arguments, by which they are made, and what its answer is held against."""

    name: str
    takes: tuple[str, ...]
    check: Callable[..., None]

    def __call__(self, *arguments):
        return getattr(fastsparse, self.name)(*arguments)

    def verify(self, *arguments) -> Tensor:
        out = self(*arguments)
        self.check(out, *arguments)
        return out

    def make(self, N, k, M, D, dtype=torch.float32, *, numbers=random, distinct=True, seed=0) -> list:
        sizes = {"values": (N, k), "x": (N, D), "weight": (M, D)}
        return [
            M
            if name == "M"
            else random_indices(N, k, M, seed=seed + 2, distinct=distinct)
            if name == "indices"
            else numbers(*sizes[name], seed=seed + place, dtype=dtype)
            for place, name in enumerate(self.takes)
        ]

    @property
    def dense(self) -> tuple[int, int]:
        """Where the two floating tensors are."""
        return tuple(place for place, name in enumerate(self.takes) if name not in ("indices", "M"))


SPMM = Product("spmm", ("values", "indices", "weight"), assert_spmm)
SDDMM = Product("sddmm", ("x", "weight", "indices"), assert_sddmm)
SPMM_T = Product("spmm_t", ("values", "indices", "x", "M"), assert_spmm_t)
PRODUCTS = (SPMM, SDDMM, SPMM_T)
every_product = pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: product.name)

# (N, k, M, D), around the edges of vectors, of unrolled columns, of row blocks and of split latents.
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
MANY_TO_ONE = [
    *((50, 3, M, 9) for M in (3, 4, 511, 513, 1024, 2049, 20000)),
    *((N, 1, 1, 5) for N in (127, 128, 129, 511, 513, 1023, 1025, 4097, 20000)),  # all to one latent
]


@pytest.mark.parametrize(
    ("product", "shape"),
    [*((product, shape) for product in PRODUCTS for shape in SHAPES), *((SPMM_T, s) for s in MANY_TO_ONE)],
    ids=lambda value: value.name if isinstance(value, Product) else "x".join(map(str, value)),
)
def test_shapes(backend, product, shape):
    product.verify(*product.make(*shape))


@every_product
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 0, 5, 4), (17, 9, 40, 33), (65, 33, 129, 70), (900, 4, 7, 257)], ids=str
)
def test_dtypes(backend, product, dtype, shape):
    assert product.verify(*product.make(*shape, dtype)).is_contiguous()


@every_product
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of_first", LAYOUTS)
@pytest.mark.parametrize("of_second", LAYOUTS)
@pytest.mark.parametrize("of_indices", LAYOUTS)
def test_layouts(backend, product, dtype, of_first, of_second, of_indices):
    made = product.make(19, 7, 53, 37, dtype)
    layouts = dict(zip(product.dense, (of_first, of_second), strict=True))
    laid = [
        laid_out(value, layouts.get(place, of_indices)) if isinstance(value, Tensor) else value
        for place, value in enumerate(made)
    ]
    product.check(product(*laid), *made)


@every_product
def test_expanded_inputs(backend, product):
    for place in range(3):
        for axis in (0, 1):
            made = product.make(19, 7, 53, 37)
            made[place] = made[place].narrow(axis, 0, 1).expand_as(made[place])
            product.verify(*made)


@every_product
@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-42])
def test_magnitudes(backend, product, scale):
    for place in product.dense:
        made = product.make(40, 6, 30, 33)
        made[place] = made[place] * scale
        product.verify(*made)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("terms", [129, 3000])
@every_product
def test_sums_are_carried_beyond_the_range_and_precision_of_halves(backend, product, dtype, terms):
    """60000 + 60000 - 60000 overflows fp16; 256 + 128 ones is lost in bf16."""
    large = torch.zeros(1, terms, dtype=dtype)
    large[0, :3] = torch.tensor([60000.0, 60000.0, -60000.0])
    small = torch.ones(1, terms, dtype=dtype).index_fill(1, torch.tensor([0]), 256.0)
    for numbers, total in (
        (large, large[0, 0].item()),
        (small, float(torch.tensor(255.0 + terms).to(dtype))),
    ):
        zeros = torch.zeros(1, terms, dtype=torch.int64)
        arguments = {
            SPMM: (numbers, zeros, torch.ones(1, 2, dtype=dtype)),
            SDDMM: (numbers, torch.ones(1, terms, dtype=dtype), zeros[:, :2]),
            SPMM_T: (numbers.T.clone(), zeros.T, torch.ones(terms, 2, dtype=dtype), 1),
        }
        assert product(*arguments[product]).tolist() == [[total, total]]


@every_product
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite(backend, product, bad):
    made = product.make(9, 6, 30, 33)
    first, second = (made[place] for place in product.dense)
    first[2, 3] = bad
    first[7, 0] = 0
    indices = made[product.takes.index("indices")]
    row = indices[7, 0] if product.takes[product.dense[1]] == "weight" else 7
    second[4, 5] = bad
    second[row, 0 if product is SDDMM else 8] = bad  # 0 * inf is NaN
    out = product.verify(*made)
    assert out[{SPMM: (7, 8), SDDMM: (7, 0), SPMM_T: (int(indices[7, 0]), 8)}[product]].isnan()


@every_product
@pytest.mark.parametrize("offender", [7000, 40, -1, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("position", [(0, 0), (3, 1), (4, 4)], ids=str)
def test_index_out_of_range(backend, product, offender, position):
    made = product.make(5, 5, 40, 8)
    made[product.takes.index("indices")][position] = offender
    n, j = position
    with pytest.raises(
        IndexError, match=rf"^{product.name}: indices\[{n}, {j}\] must be in \[0, 40\), got {offender}$"
    ):
        product(*made)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("product", "D"), [(SPMM, 9), (SPMM, 256), (SDDMM, 9), (SDDMM, 1056)])
def test_a_token_does_not_depend_on_the_others(backend, dtype, product, D):
    if backend == "reference" or (product is SDDMM and not backend.startswith(("triton", "cuda"))):
        pytest.skip(
            "the kernels alone promise it, for sddmm those for GPUs: sums of others are the library's"
        )
    made = product.make(200, 37, 60, D, dtype)
    every, indices = product(*made), product.takes.index("indices")
    for N in (1, 3, 40):
        some = [v if name == "weight" else v[:N] for name, v in zip(product.takes, made, strict=True)]
        assert torch.equal(product(*some), every[:N])
    if product is SDDMM:
        some[indices] = some[indices][:, :2]
        assert torch.equal(product(*some), every[:40, :2])


@every_product
def test_gradients_equal_the_differentiated_reference(backend, product):
    made = product.make(21, 6, 30, 8, numbers=integers, distinct=False)

    def gradients(op):
        given = list(made)
        for place in product.dense:
            given[place] = made[place].clone().requires_grad_()
        out = op(*given)
        out.backward(integers(*out.shape, seed=4))
        return [given[place].grad for place in product.dense]

    assert all(map(torch.equal, gradients(product), gradients(getattr(reference, product.name))))


@every_product
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_any_numbers(backend, product, data, dtype):
    values, indices, M, D = data.draw(codes())
    given = {"values": values.to(dtype), "indices": indices, "M": M}
    for name, rows in (("x", len(indices)), ("weight", M)):
        if name in product.takes:
            given[name] = data.draw(tensors((rows, D))).to(dtype)
    product.verify(*(given[name] for name in product.takes))


small_codes = codes(elements=st.integers(-8, 8))


@given(code=small_codes, seed=st.integers(0, 2**31))
def test_they_are_dense_products_and_each_others_adjoints(backend, code, seed):
    """<S W, y> = <S, sddmm(y, W)> = <W, S^T y>, exactly, in integers, indices that come again included."""
    values, indices, M, D = code
    weight, y = integers(M, D, seed=seed), integers(len(values), D, seed=seed + 1)
    dense = torch.zeros(len(values), M).scatter_add(1, indices, values)
    product, back = fastsparse.spmm(values, indices, weight), fastsparse.spmm_t(values, indices, y, M)
    scores = fastsparse.sddmm(y, weight, indices)
    assert torch.equal(product, dense @ weight)
    assert torch.equal(back, dense.T @ y)
    assert torch.equal(scores, (y @ weight.T).gather(1, indices))
    assert (product * y).sum() == (values * scores).sum() == (weight * back).sum()


@pytest.mark.parametrize("hot", [False, True])
def test_a_weight_beyond_the_cache_with_every_atom_used_often(backend, hot):
    # Done by panels of columns on the CPU, unless a few hot atoms make up most of the code.
    values, weight = random(2600, 8, seed=1), random(4200, 1030, seed=3)
    indices = random_indices(2600, 8, 40 if hot else 4200, seed=2, distinct=False)
    out, some = fastsparse.spmm(values, indices, weight), slice(None, None, 97)
    assert_spmm(out[some], values[some], indices[some], weight)


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


# sparse_decode: spmm with a bias, against what PyTorch users write by hand today.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 3, 5, 4), (1, 1, 1, 1), (24, 9, 40, 33), (2, 0, 3, 5)], ids=str)
def test_decoding_adds_the_bias(backend, dtype, shape):
    values, indices, weight = SPMM.make(*shape, dtype)
    bias = random(shape[3], seed=4, dtype=dtype)
    out = fastsparse.sparse_decode(values, indices, weight, bias)
    assert_spmm(out, values, indices, weight, bias)
    assert torch.equal(fastsparse.sparse_decode(values, indices, weight), SPMM(values, indices, weight))


def test_decoding_equals_embedding_bag_forward_and_backward(backend):
    inputs = integers(20, 6, seed=1), integers(30, 9, seed=2), integers(9, seed=3)
    indices, upstream = random_indices(20, 6, 30, seed=4), integers(20, 9, seed=5)

    def run(decode):
        values, weight, bias = (tensor.clone().requires_grad_() for tensor in inputs)
        out = decode(values, weight, bias)
        out.backward(upstream)
        return out, values.grad, weight.grad, bias.grad

    def bag(values, weight, bias):
        return F.embedding_bag(indices, weight, per_sample_weights=values, mode="sum") + bias

    ours = run(lambda values, weight, bias: fastsparse.sparse_decode(values, indices, weight, bias))
    assert all(map(torch.equal, ours, run(bag)))


def test_decoding_undoes_an_encoding_by_an_orthonormal_dictionary(backend):
    # With k = M = D and orthonormal rows, decoding the code of x gives x.
    dictionary = torch.linalg.qr(random(24, 24, seed=1, dtype=torch.float64)).Q
    x = random(10, 24, seed=2, dtype=torch.float64)
    code = fastsparse.topk_encode(x, dictionary, k=24, activation="none")
    torch.testing.assert_close(fastsparse.sparse_decode(*code, dictionary), x)
