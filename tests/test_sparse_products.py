"""spmm, sddmm, spmm_t, sparse_decode on every backend: products with a sparse code, and their gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

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
from fastsparse.functional.codes import Ragged


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

    def ragged(self, counts, M, D, dtype=torch.float32, *, padding=0, numbers=random, seed=0) -> list:
        """The same of a code whose rows have so many entries; what lies behind them must not be touched."""
        live = sum(counts)
        values = numbers(live + padding, seed=seed, dtype=dtype)
        indices = random_indices(live + padding, 1, M, seed=seed + 2, distinct=False)[:, 0]
        values[live:], indices[live:] = torch.nan, 0
        code = {"values": values, "indices": indices}
        sides = self.make(len(counts), 0, M, D, dtype, numbers=numbers, seed=seed)
        made = [code.get(name, side) for name, side in zip(self.takes, sides, strict=True)]
        return [*made, offsets_of(counts)]

    @property
    def dense(self) -> tuple[int, int]:
        """Where the two floating tensors are."""
        return tuple(place for place, name in enumerate(self.takes) if name not in ("indices", "M"))


def offsets_of(counts: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(counts)])


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
@pytest.mark.parametrize("ragged", [False, True])
def test_a_weight_beyond_the_cache_with_every_atom_used_often(backend, hot, ragged):
    # Done by panels of columns on the CPU, unless a few hot atoms make up most of the code.
    values, weight = random(2600, 8, seed=1), random(4200, 1030, seed=3)
    indices = random_indices(2600, 8, 40 if hot else 4200, seed=2, distinct=False)
    if ragged:
        counts = [2500, 0, *[97] * 188, 0]
        counts[-1] = values.numel() - sum(counts)
        values, indices, offsets = values.flatten(), indices.flatten(), offsets_of(counts)
        out, some = fastsparse.spmm(values, indices, weight, offsets), slice(2500)
        assert_spmm(out[:1], values[some], indices[some], weight, offsets_of([2500]))
        some = slice(2500, 2500 + 97 * 9)
        assert_spmm(out[1:11], values[some], indices[some], weight, offsets_of(counts[1:11]))
    else:
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


# Ragged codes.

# How many entries rows have: as BatchTopK's, few in most and many in some; one that has all of them; some of
# about so many as kernels cut them at; none.
ROWS = {
    "of a batch": (6 * (1.3 * random(70, seed=1)).exp()).long().tolist(),
    "one of all": [0, 3000, 0],
    "long ones": [1, 1500, 0, 0, 1024, 1025, 2, 2049],
    "empty": [0] * 7,
    "none": [],
}


@every_product
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("D", [0, 1, 37, 256])
def test_ragged(backend, product, dtype, rows, padding, D):
    assert product.verify(*product.ragged(ROWS[rows], 60, D, dtype, padding=padding)).is_contiguous()


@every_product
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ragged_layouts(backend, product, layout):
    made = product.ragged(ROWS["of a batch"], 53, 37)
    product.check(product(*(laid_out(v, layout) if isinstance(v, Tensor) else v for v in made)), *made)


@every_product
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(19, 7, 53, 1), (40, 31, 60, 70), (3, 1024, 2000, 37)], ids=str)
def test_rows_of_one_length_are_as_without_offsets(backend, product, dtype, shape):
    # To the bit on the CPU, where the order of a sum is the same, the latents' sums included.
    numbers = random if backend.startswith("cpu") else integers
    made, (N, k, *_) = product.make(*shape, dtype, numbers=numbers), shape
    flat = [v.flatten() if name in ("values", "indices") else v
            for name, v in zip(product.takes, made, strict=True)]  # fmt: skip
    out = product(*made)
    assert torch.equal(product(*flat, offsets_of([k] * N)), out.flatten() if product is SDDMM else out)


@every_product
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [1, 257])
def test_ragged_runs_agree_bitwise(backend, threads, product, dtype, D):
    if not backend.startswith("cpu"):
        pytest.skip("of the others test_every_op.py has it: they cut nothing by threads")
    made, outs = product.ragged(ROWS["long ones"] * (8 if D == 1 else 1), 20, D, dtype), []
    for count in (1, 2, 3, 1):
        threads(count)
        outs.append(product(*made))
    assert all(torch.equal(out, outs[0]) for out in outs)


DENSE = {
    SPMM: lambda values, indices, weight, offsets: (
        Ragged(values, indices, offsets).to_dense(len(weight)) @ weight
    ),
    SDDMM: lambda x, weight, indices, offsets: F.pad(x @ weight.T, (0, 0, 0, 1))[
        Ragged(indices, indices, offsets).rows(), indices
    ],
    SPMM_T: lambda values, indices, x, M, offsets: Ragged(values, indices, offsets).to_dense(M).T @ x,
}


@every_product
@pytest.mark.parametrize("D", [1, 5])
def test_ragged_gradients_are_those_of_dense_products(backend, product, D):
    """Of the first order and of the second, exactly, in integers."""
    numbers = partial(integers, limit=1)
    made = product.ragged([3, 0, 7, 1, 0], 6, D, padding=2, numbers=numbers)
    made[0] = made[0].nan_to_num(7.0)  # the reference's gradients are zeros times what is behind the last row

    def derivatives(op):
        given = list(made)
        leaves = [made[place].clone().requires_grad_() for place in product.dense]
        for place, leaf in zip(product.dense, leaves, strict=True):
            given[place] = leaf
        out = op(*given)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)
        return out, *first, *second

    assert all(map(torch.equal, derivatives(product), derivatives(DENSE[product])))


def test_virtual_rows_are_partial_sums(backend):
    """Offsets may cut a token's code into pieces: those of Matryoshka's prefixes, in one product."""
    pieces = torch.tensor([[3, 0, 4], [0, 0, 0], [12, 0, 0], [0, 0, 1200], [1, 1, 1]])
    values, indices, weight, offsets = SPMM.ragged(pieces.flatten().tolist(), 30, 9, numbers=integers)
    parts = fastsparse.spmm(values, indices, weight, offsets).unflatten(0, pieces.shape)
    for used, prefix in enumerate(parts.cumsum(1).unbind(1), 1):
        places = torch.cat(
            [torch.arange(a, b) for a, b in zip(offsets[:-1:3], offsets[used::3], strict=True)]
        )
        counts = pieces[:, :used].sum(1).tolist()
        code = values[places], indices[places]
        assert torch.equal(prefix, fastsparse.spmm(*code, weight, offsets_of(counts)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_of_latents_are_gathered_and_their_gradients_added(backend, dtype):
    """``theta[indices]`` as a product, whose gradient is the same for any number of threads."""
    _, indices, x, M, offsets = SPMM_T.ragged(ROWS["of a batch"], 40, 1, dtype)
    theta, upstream = (
        random(M, seed=1, dtype=dtype).requires_grad_(),
        integers(len(indices), seed=2, dtype=dtype),
    )
    gathered = fastsparse.sddmm(torch.ones_like(x), theta.unsqueeze(1), indices, offsets)
    gathered.backward(upstream)
    assert torch.equal(gathered, theta[indices])
    assert torch.equal(theta.grad, upstream.new_zeros(M).index_add(0, indices, upstream))


@every_product
@pytest.mark.parametrize(
    ("offsets", "error", "says"),
    [
        ([1, 3, 9], ValueError, "begin at 0, got 1$"),
        ([0, 7, 6], ValueError, "not decrease, got 6 after 7 at 2$"),
        ([0, 3, 10], ValueError, r"end at the number of entries \(9\), got 10; what lies behind is padding"),
        ([0, 3, 8], ValueError, r"end at the number of entries \(9\), got 8; what lies behind is padding"),
        ([[0], [3], [9]], ValueError, r"have shape \(N \+ 1,\)"),
        ([], ValueError, r"have shape \(N \+ 1,\)"),
        (torch.tensor([0, 3, 9], dtype=torch.int32), TypeError, "be int64, got int32$"),
        ((0, 3, 9), TypeError, "be a torch.Tensor, got tuple$"),
    ],
)
def test_offsets_that_bound_no_rows(backend, product, offsets, error, says):
    *made, _ = product.ragged([3, 6], 40, 8)
    made[product.takes.index("indices")][8] = 1
    if isinstance(offsets, list):
        offsets = torch.tensor(offsets, dtype=torch.int64)
    with pytest.raises(error, match=f"^{product.name}: offsets must {says}"):
        product(*made, offsets)


@every_product
def test_offsets_beside_what_they_are_not_for(backend, product):
    made = product.make(2, 3, 40, 8)
    with pytest.raises(ValueError, match=rf"^{product.name}: indices must have shape \(E,\) where offsets"):
        product(*made, offsets_of([3, 3]))
    *made, _ = product.ragged([3, 6], 40, 8)
    if product is not SPMM:
        with pytest.raises(
            ValueError, match=r"offsets must have shape \(N \+ 1,\) = \(3,\), got shape \(4,\)"
        ):
            product(*made, offsets_of([3, 3, 3]))
    made[product.takes.index("indices")][4] = 40
    with pytest.raises(IndexError, match=rf"^{product.name}: indices\[4\] must be in \[0, 40\), got 40$"):
        product(*made, offsets_of([3, 6]))


# sparse_decode: spmm with a bias, against what PyTorch users write by hand today.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 3, 5, 4), (1, 1, 1, 1), (24, 9, 40, 33), (2, 0, 3, 5)], ids=str)
def test_decoding_adds_the_bias(backend, dtype, shape):
    values, indices, weight = SPMM.make(*shape, dtype)
    bias = random(shape[3], seed=4, dtype=dtype)
    out = fastsparse.sparse_decode(values, indices, weight, bias)
    assert_spmm(out, values, indices, weight, bias=bias)
    assert torch.equal(fastsparse.sparse_decode(values, indices, weight), SPMM(values, indices, weight))


@pytest.mark.parametrize("ragged", [False, True])
def test_decoding_equals_embedding_bag_forward_and_backward(backend, ragged):
    inputs = integers(20, 6, seed=1), integers(30, 9, seed=2), integers(9, seed=3)
    indices, upstream, offsets = random_indices(20, 6, 30, seed=4), integers(20, 9, seed=5), None
    if ragged:
        offsets = offsets_of([0, 45, *[4] * 17, 7])
        inputs, indices = (inputs[0].flatten(), *inputs[1:]), indices.flatten()

    def run(decode):
        values, weight, bias = (tensor.clone().requires_grad_() for tensor in inputs)
        out = decode(values, weight, bias)
        out.backward(upstream)
        return out, values.grad, weight.grad, bias.grad

    def bag(values, weight, bias):
        bags = None if offsets is None else offsets[:-1]
        return F.embedding_bag(indices, weight, bags, per_sample_weights=values, mode="sum") + bias

    ours = run(lambda values, weight, bias: fastsparse.sparse_decode(values, indices, weight, bias, offsets))
    assert all(map(torch.equal, ours, run(bag)))


def test_decoding_undoes_an_encoding_by_an_orthonormal_dictionary(backend):
    # With k = M = D and orthonormal rows, decoding the code of x gives x.
    dictionary = torch.linalg.qr(random(24, 24, seed=1, dtype=torch.float64)).Q
    x = random(10, 24, seed=2, dtype=torch.float64)
    code = fastsparse.topk_encode(x, dictionary, k=24, activation="none")
    torch.testing.assert_close(fastsparse.sparse_decode(*code, dictionary), x)
