"""topk_encode on every backend: the right latents, the right values, whatever the shape, layout and data."""

import pytest
import torch
from backends import backend_names, running
from hypothesis import given
from hypothesis import strategies as st
from knobs import turned
from oracle import DTYPES, LAYOUTS, assert_topk, integers, laid_out, random, shapes
from strategies import tensors

import fastsparse
from fastsparse import reference
from fastsparse.backend import _cpu

# (N, D, M, k), around the edges of vectors, row blocks (16, 32, 2048, 4096) and of stripes (512 to 2048).
SHAPES = [
    *shapes(
        (2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 65, 127, 129),
        (1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 65, 70, 257),
        (2, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129),
        (2,),
    ),
    *shapes((3,), (24,), (511, 512, 513, 1023, 1024, 1025, 2047, 2049), (1, 7, 8, 9, 15, 16, 17, 31)),
    *((4, 16, 600, k) for k in (33, 63, 65, 127, 129, 511, 599, 600)),
    *((N, 4, 130, 3) for N in (1025, 2049, 4097)),
    (0, 16, 32, 4),
    (0, 0, 1, 1),
    (3, 0, 5, 2),
    (1, 1, 1, 1),
    (2, 3, 1, 1),
    (33, 70, 4099, 33),
    (100, 64, 8192, 16),
    (17, 384, 6144, 16),
]


@pytest.fixture(params=backend_names(screened=True))
def backend(request) -> str:
    """Every backend, and the compiled one with its screen forced as well."""
    with running(request.param):
        yield request.param


def encode(x, weight, bias=None, *, k, **options):
    """Encode, and hold the answer against the exact scores."""
    code = fastsparse.topk_encode(x, weight, bias, k=k, **options)
    assert_topk(code, x, weight, bias, k=k, **options)
    return code


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_shapes(backend, shape):
    N, D, M, k = shape
    encode(random(N, D, seed=1), random(M, D, seed=2), random(M, seed=3), k=k)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 0, 5, 2), (17, 33, 129, 7), (65, 70, 1025, 16), (2, 257, 2049, 33)]
)
def test_dtypes(backend, dtype, shape):
    N, D, M, k = shape
    x, weight, bias = (random(*size, seed=1, dtype=dtype) for size in ((N, D), (M, D), (M,)))
    for activation in ("relu", "none"):
        encode(x, weight, bias, k=k, activation=activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of_x", LAYOUTS)
@pytest.mark.parametrize("of_weight", LAYOUTS)
def test_layouts(backend, dtype, of_x, of_weight):
    x, weight = random(19, 37, seed=1, dtype=dtype), random(523, 37, seed=2, dtype=dtype)
    bias, scale = random(523, seed=3, dtype=dtype), random(523, seed=4, dtype=dtype)
    mask = random(523, seed=5) > 0
    of_vector = "strided" if of_x == "transposed" else of_x
    encode(
        laid_out(x, of_x),
        laid_out(weight, of_weight),
        laid_out(bias, of_vector),
        k=9,
        latent_scale=laid_out(scale, of_vector),
        latent_mask=torch.stack((mask, ~mask), 1)[:, 0],
    )


@pytest.mark.parametrize("N", [1, 40])
def test_expanded_inputs(backend, N):
    # Integers, whose sums are exact: a library may add the last columns of a product in another order.
    x, weight = integers(37, seed=1).expand(N, 37), integers(1, 37, seed=2).expand(600, 37)
    bias = integers(1, seed=3).expand(600)
    encode(x, random(600, 37, seed=4), bias, k=5)
    _, indices = encode(x, weight, bias, k=5)
    assert torch.equal(indices, torch.arange(5).expand(N, 5)), "equal scores: the lowest latents"
    encode(x[:, :1].expand(N, 37), weight, random(600, seed=5), k=5)


# Exact scores: the answer is one, and every backend must give it.


def assert_same_as_reference(
    x, weight, bias=None, *, k, activation="relu", latent_scale=None, latent_mask=None
):
    values, indices = fastsparse.topk_encode(
        x, weight, bias, k=k, activation=activation, latent_scale=latent_scale, latent_mask=latent_mask
    )
    right = reference.topk_encode(x, weight, bias, k, activation, latent_scale, latent_mask)
    assert torch.equal(indices, right[1])
    assert torch.equal(values.nan_to_num(123.0), right[0].nan_to_num(123.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 9, 9), (40, 3, 130, 20), (33, 16, 2049, 64), (5, 8, 513, 513), (16, 64, 4096, 1)]
)
def test_ties(backend, dtype, shape):
    N, D, M, k = shape
    x, weight = integers(N, D, seed=1, limit=2, dtype=dtype), integers(M, D, seed=2, limit=2, dtype=dtype)
    bias = integers(M, seed=3, limit=1, dtype=dtype)
    for activation in ("relu", "none", "abs"):
        assert_same_as_reference(x, weight, bias, k=k, activation=activation)
    scale = integers(M, seed=4, limit=2, dtype=dtype)
    mask = (torch.arange(M) % 3 > 0) | (k == M)
    for activation in ("none", "abs"):
        options = {"activation": activation, "latent_scale": scale, "latent_mask": mask}
        assert_same_as_reference(x, weight, bias, k=min(k, int(mask.sum())), **options)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0])
@pytest.mark.parametrize("M", [7, 600, 2049])
def test_constant_scores(backend, value, M):
    assert_same_as_reference(torch.full((20, 3), value), torch.ones(M, 3), k=min(M, 65), activation="none")
    both_zeros = torch.where(torch.arange(M) % 2 == 0, 0.0, -0.0).unsqueeze(1)
    assert_same_as_reference(torch.ones(20, 1), both_zeros, k=min(M, 65), activation="none")


@pytest.mark.parametrize("M", [100, 1025, 5000])
@pytest.mark.parametrize("direction", [1, -1])
def test_sorted_scores(backend, M, direction):
    # Ascending, every latent beats the bound that the earlier ones set; descending, none does.
    x, weight = integers(40, 1, seed=1, limit=1).abs() + 1, direction * torch.arange(M).float().unsqueeze(1)
    assert_same_as_reference(x, weight, k=17, activation="none")
    assert_same_as_reference(x, torch.zeros(M, 1), weight[:, 0], k=17, activation="none")


@pytest.mark.parametrize("eligible", [5, 6, 64, 2000, 2048])
@pytest.mark.parametrize("where", ["first", "last", "spread"])
def test_masks(backend, eligible, where):
    order = {
        "first": torch.arange(2048),
        "last": torch.arange(2048).flip(0),
        "spread": random(2048, seed=7).argsort(),
    }
    mask = torch.zeros(2048, dtype=torch.bool)
    mask[order[where][:eligible]] = True
    x, weight, bias = integers(35, 16, seed=1), integers(2048, 16, seed=2), integers(2048, seed=3)
    assert_same_as_reference(x, weight, bias, k=5, activation="none", latent_mask=mask)
    encode(random(35, 16, seed=4), random(2048, 16, seed=5), k=5, latent_mask=mask)


def test_masked_latents_are_never_read_into_the_answer(backend):
    mask = torch.arange(700) % 2 == 1
    x, weight = random(20, 16, seed=1), random(700, 16, seed=2)
    spoiled = weight.masked_fill(~mask.unsqueeze(1), torch.nan)
    bias = torch.zeros(700).masked_fill(~mask, torch.inf)
    values, indices = fastsparse.topk_encode(x, spoiled, bias, k=6, latent_mask=mask)
    right = reference.topk_encode(x, weight, None, 6, "relu", None, mask)
    assert torch.equal(indices, right[1])
    torch.testing.assert_close(values, right[0])


@pytest.mark.parametrize("activation", ["relu", "none", "abs"])
@pytest.mark.parametrize("scale", ["positive", "mixed", "negative", "zero", "huge", "tiny"])
def test_latent_scale(backend, activation, scale):
    x, weight, bias = random(33, 24, seed=1), random(900, 24, seed=2), random(900, seed=3)
    normal = random(900, seed=4)
    scales = {
        "positive": normal.abs() + 0.1,
        "mixed": normal,
        "negative": -normal.abs(),
        "zero": torch.zeros(900),
        "huge": normal * 1e30,
        "tiny": normal * 1e-38,
    }
    _, indices = encode(x, weight, bias, k=7, activation=activation, latent_scale=scales[scale])
    if scale == "zero":
        assert torch.equal(indices, torch.arange(7).expand(33, 7))


def test_relu_keeps_fewer_than_k_positive_scores(backend):
    # All slots are filled, in order of the scores, with 0 where the score is negative.
    weight = torch.tensor([[-3.0], [1.0], [-1.0], [-2.0]])
    values, indices = fastsparse.topk_encode(torch.ones(1, 1), weight, k=3)
    assert values.tolist() == [[1.0, 0.0, 0.0]]
    assert indices.tolist() == [[1, 2, 3]]


# Few tokens, whose scores are made in tiles: 4 or 6 tokens by 3, 4 or 6 latents, 8 to 32 columns at a time.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 23])
def test_few_tokens(backend, dtype, N):
    for D, M in ((1, 4), (7, 5), (33, 6), (40, 7), (63, 11), (97, 13), (200, 100)):
        x, weight, bias = (random(*size, seed=1, dtype=dtype) for size in ((N, D), (M, D), (M,)))
        encode(x, weight, bias, k=3, activation="none")
        mask = torch.arange(M) % 4 != 1
        encode(x, weight, bias, k=3, activation="abs", latent_mask=mask)


@pytest.mark.parametrize("N", [1, 7, 8, 9, 16, 17, 48, 49])
@pytest.mark.parametrize("of", ["tokens", "latents"])
def test_bf16_subnormals_are_no_zeros(backend, N, of):
    """Processors' products of bf16 take them for such. The sums of these are exact in fp32."""
    x, weight = integers(N, 64, seed=1), integers(1200, 64, seed=2)
    scale_x, scale_weight = (2.0**-130, 2.0**60) if of == "tokens" else (2.0**60, 2.0**-130)
    x, weight = (x * scale_x).bfloat16(), (weight * scale_weight).bfloat16()
    values, indices = fastsparse.topk_encode(x, weight, k=5, activation="none")
    right = reference.topk_encode(x.double(), weight.double(), None, 5, "none", None, None)
    assert torch.equal(indices, right[1])
    assert torch.equal(values, right[0].bfloat16())


# Data that a low-precision screen gets wrong unless its bound holds.


def outliers(size: float, places: slice | int, D: int) -> torch.Tensor:
    scale = torch.ones(D)
    scale[places] = size
    return scale


DATA = {
    "close together": lambda x, w, b: (x, w[:1] + 2.0**-14 * w, b * 0),
    "common offset": lambda x, w, b: (x + 100, w + 100, b),
    "outlier dimensions": lambda x, w, b: (
        x * outliers(1000, slice(3), x.shape[1]),
        w / outliers(1000, slice(3), x.shape[1]),
        b,
    ),
    "outliers on one side": lambda x, w, b: (x * outliers(1e4, 5, x.shape[1]), w, b),
    "dominating bias": lambda x, w, b: (x, w, 1e4 * b),
    "equal bias cancels": lambda x, w, b: (x, w, -(x[0] @ w.T)),
    "rows of all sizes": lambda x, w, b: (
        x * torch.logspace(-20, 15, len(x)).unsqueeze(1),
        w * torch.logspace(-8, 8, len(w)).unsqueeze(1),
        b,
    ),
    "huge": lambda x, w, b: (x * 1e30, w * 1e-30, b),
    "tiny": lambda x, w, b: (x * 1e-18, w * 1e-18, b * 1e-36),
    "subnormal inputs": lambda x, w, b: (x * 1e-40, w, b * 1e-40),
    "subnormal scores": lambda x, w, b: (x * 1e-22, w * 1e-22, None),
    # Finite in fp32, infinite once rounded to bf16.
    "overflows bf16": lambda x, w, b: (torch.where(torch.arange(x.shape[1]) == 3, 3.4e38, x), w * 1e-6, b),
    "overflows in part": lambda x, w, b: (
        x * 1e19,
        w * torch.where(torch.arange(len(w)) % 7 == 0, 1e19, 1.0).unsqueeze(1),
        b,
    ),
    "sparse tokens": lambda x, w, b: (x * (x.abs() > 1.5), w, b * 0),
    "zero tokens": lambda x, w, b: (x * 0, w, b),
}


@pytest.mark.parametrize("shape", [(48, 64, 3000, 16), (5, 200, 1100, 40)], ids=str)
@pytest.mark.parametrize("data", DATA)
def test_hostile_data(backend, data, shape):
    N, D, M, k = shape
    x, weight, bias = DATA[data](random(N, D, seed=1), random(M, D, seed=2), random(M, seed=3))
    for activation in ("none", "abs"):
        encode(x, weight, bias, k=k, activation=activation)


@pytest.mark.parametrize("D", [1, 2, 3, 7, 8, 9, 15, 17, 511, 512, 513, 1024, 1025, 5000])
def test_widths_around_the_parts_of_a_row(backend, D):
    # All entries as large as can be, or one among tiny ones.
    x, weight, bias = random(20, D, seed=1), random(300, D, seed=2), random(300, seed=3)
    encode(x.sign(), weight.sign(), None, k=5)
    encode(x * outliers(1e6, D // 2, D), weight, bias, k=5)


@pytest.mark.parametrize("fused", [0, 1])
@pytest.mark.parametrize("strassen", [0, 1])
@pytest.mark.parametrize("name", [name for name in backend_names(screened=True) if "integers" in name])
def test_products_of_integers(name, strassen, fused):
    """By the processor's multiply-add, if it has one, or without; by Strassen's product or the definition."""
    with running(name), turned(_cpu.library, fused=fused, strassen=strassen):
        for N, D in ((40, 3), (130, 64), (24, 513), (230, 40), (25, 1025)):  # around groups of 24 tokens
            x, weight, bias = random(N, D, seed=1), random(300, D, seed=2), random(300, seed=3)
            encode(x, weight, bias, k=5)
            encode(x.sign(), weight.sign(), None, k=5)


def overflowing_when_rounded(how: str, N: int, D: int, M: int) -> tuple[dict, list[int]]:
    """Arguments whose keys are finite, but not all in bf16; and the 20 best latents."""
    x, weight, bias, scale = torch.zeros(N, D), torch.zeros(M, D), torch.zeros(M), torch.ones(M)
    below = 2.0**28 - 2.0**17  # which is rounded up
    if how == "summed":
        x[:, :3] = 2.0**100
        weight[:50, :2] = torch.tensor([below, 2.0**6 - below])  # 2^106
        weight[50:60, 0] = 2.0**25
        weight[-10:, :3] = torch.tensor([-below, 2.0**27, 2.0**27 - 2.0**10])  # -inf or NaN, but nearly 2^117
        best = [*range(50, 60), *range(M - 10, M)]
    else:
        x[:, 0] = 2.0**33
        weight[:50, 0] = below
        bias[50:60] = 2.0**61 - 2.0**48
        scale[:] = 2.0**67
        best = [*range(50, 60), *range(10)]
    return {"x": x, "weight": weight, "bias": bias, "latent_scale": scale, "activation": "none"}, best


@pytest.mark.parametrize("k", [5, 16, 20])
@pytest.mark.parametrize("how", ["summed", "scaled"])
def test_keys_that_overflow_when_rounded(backend, how, k):
    arguments, best = overflowing_when_rounded(how, 5, 200, 1100)
    assert (fastsparse.topk_encode(**arguments, k=k).indices == torch.tensor(best[:k])).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_selection_precedes_rounding(backend, dtype):
    # Scores that differ by less than the output can hold are still told apart; here they are exact in fp32.
    M = 300
    weight = torch.ones(M, 2, dtype=dtype)
    weight[:, 1] = (
        torch.arange(M).roll(100).to(dtype) / 512
    )  # 300 / 512 and 1 have 9 bits and more between them
    x = torch.tensor([[64.0, 0.5]], dtype=dtype)
    values, indices = encode(x, weight, k=9, activation="none")
    exact = x.double() @ weight.double().T
    assert torch.equal(indices, exact.sort(descending=True, stable=True).indices[:, :9])
    assert len(values.unique()) < 9


NON_FINITE = [torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "none", "abs"])
@pytest.mark.parametrize("bad", NON_FINITE)
@pytest.mark.parametrize("where", ["x", "weight", "bias", "latent_scale"])
def test_non_finite(backend, where, bad, activation, dtype):
    inputs = {
        "x": random(40, 16, seed=1),
        "weight": random(1100, 16, seed=2),
        "bias": random(1100, seed=3),
        "latent_scale": random(1100, seed=4) if where == "latent_scale" else torch.ones(1100),
    }
    inputs[where][torch.arange(len(inputs[where])) % 13 == 5] = bad  # whole rows of x and weight
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    encode(**inputs, k=9, activation=activation)


def test_nan_is_the_largest_and_stays_in_its_own_rows(backend):
    x, weight = random(40, 16, seed=1), random(1100, 16, seed=2)
    clean = fastsparse.topk_encode(x, weight, k=4)
    x[7, 3] = torch.nan
    values, indices = fastsparse.topk_encode(x, weight, k=4)
    assert values[7].isnan().all()
    assert indices[7].tolist() == [0, 1, 2, 3]
    others = torch.arange(40) != 7
    assert torch.equal(indices[others], clean.indices[others])
    torch.testing.assert_close(values[others], clean.values[others])

    weight[[900, 30], 2] = torch.nan
    values, indices = fastsparse.topk_encode(x, weight, k=4)
    assert indices[others, :2].tolist() == [[30, 900]] * 39
    assert values[others, :2].isnan().all()
    assert not values[others, 2:].isnan().any()


@pytest.mark.parametrize("M", [7, 40, 1100])
@pytest.mark.parametrize("above", [0, 1, 2])
def test_minus_infinity_fills_a_row_like_any_number(backend, M, above):
    # Fewer than k scores stand above -inf: the lowest of the other latents make up the rest.
    bias = torch.full((M,), -torch.inf)
    bias[M - above :] = 1
    mask = torch.arange(M) % 3 != 1
    for latent_mask in (None, mask):
        assert_same_as_reference(
            torch.zeros(20, 4), torch.ones(M, 4), bias, k=3, activation="none", latent_mask=latent_mask
        )


def test_one_infinite_entry(backend):
    x, weight = random(40, 16, seed=1), random(1100, 16, seed=2)
    weight[77, 4] = torch.inf
    values, indices = encode(x, weight, k=4, activation="none")
    assert torch.equal(indices[:, 0] == 77, x[:, 4] > 0)
    x[3, 4] = 0  # 0 * inf
    values, indices = encode(x, weight, k=4)
    assert values[3, 0].isnan()
    assert indices[3, 0] == 77


# Gradients.


def gradients(encode, inputs, upstream):
    leaves = [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in inputs]
    values = encode(*leaves)[0]
    values.backward(upstream)
    return [None if leaf is None else leaf.grad for leaf in leaves]


@pytest.mark.parametrize("activation", ["relu", "none", "abs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_equal_the_differentiated_reference(backend, activation, dtype, with_bias):
    # Integers: forward and backward are exact, so equality is too.
    x, weight = integers(21, 8, seed=1, dtype=dtype), integers(90, 8, seed=2, dtype=dtype)
    bias = integers(90, seed=3, dtype=dtype) if with_bias else None
    scale, mask = integers(90, seed=4, dtype=dtype), torch.arange(90) % 4 > 0
    upstream = integers(21, 6, seed=5, dtype=dtype)
    options = activation, scale, mask
    ours = gradients(
        lambda x, weight, bias: fastsparse.topk_encode(
            x, weight, bias, k=6, activation=activation, latent_scale=scale, latent_mask=mask
        ),
        (x, weight, bias),
        upstream,
    )
    right = gradients(
        lambda *leaves: reference.topk_encode(*leaves, 6, *options), (x, weight, bias), upstream
    )
    for mine, theirs in zip(ours, right, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)


@pytest.mark.parametrize("N", [20, 260])  # with a product of less than 2^18 multiplications, and of more
def test_views_that_overlap(backend, N):
    if N > 20 and not backend.startswith(("reference", "cpu")):
        pytest.skip("products of GPUs don't differ so")
    M, D = 130, 8
    windows = random(M + D - 1, seed=2).unfold(0, D, 1)  # strides (1, 1)
    for x, weight in (
        (random(N, D, seed=1), windows),
        (random(N + D - 1, seed=1).unfold(0, D, 1), windows),
        (random(1, D, seed=1).expand(N, D), random(M, D, seed=2)),
        (random(N, D, seed=1), random(1, D, seed=2).expand(M, D)),
    ):
        encode(x, weight, k=5)
        decoded = fastsparse.sparse_decode(*fastsparse.topk_encode(x, weight, k=5), weight)
        assert decoded.shape == (N, D)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_no_gradient_where_rounding_leaves_nothing(backend, dtype):
    """A positive score that is 0 in the dtype is 0 to relu, as to F.relu of F.linear."""
    tiny = torch.finfo(dtype).tiny
    x, weight = torch.full((2, 1), tiny, dtype=dtype), torch.tensor([[tiny], [1.0], [-1.0]], dtype=dtype)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    values, indices = fastsparse.topk_encode(x, weight, k=3)
    assert values.tolist() == [[tiny, 0, 0]] * 2
    assert indices[:, 0].tolist() == [1, 1]
    values.sum().backward()
    assert x.grad.tolist() == [[1]] * 2
    assert weight.grad.tolist() == [[0], [2 * tiny], [0]]


def test_no_gradient_to_scale(backend):
    x, scale = random(5, 4, seed=1).requires_grad_(), random(9, seed=2).requires_grad_()
    fastsparse.topk_encode(x, random(9, 4, seed=3), k=2, latent_scale=scale).values.sum().backward()
    assert x.grad is not None
    assert scale.grad is None


def test_relu_passes_gradient_to_positive_scores_and_nan_alone(backend):
    weight = torch.tensor([[2.0], [0.0], [-1.0], [torch.nan]])
    bias = torch.zeros(4, requires_grad=True)
    values, indices = fastsparse.topk_encode(torch.ones(1, 1), weight, bias, k=4)
    assert indices.tolist() == [[3, 0, 1, 2]]
    assert values.isnan().tolist() == [[True, False, False, False]]
    values.backward(torch.ones(1, 4))
    assert bias.grad.tolist() == [1.0, 0.0, 0.0, 1.0]


# Groups.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(19, 16, 600, 3, 7), (5, 4, 96, 32, 1), (40, 3, 520, 2, 65), (16, 64, 4096, 2, 16), (3, 0, 6, 3, 2),
     (0, 5, 8, 4, 1), (2, 3, 4, 4, 1)],
)  # fmt: skip
def test_groups_are_encoded_one_by_one(backend, dtype, shape):
    N, D, M, groups, k = shape
    x, weight = integers(N, D, seed=1, limit=2, dtype=dtype), integers(M, D, seed=2, limit=2, dtype=dtype)
    bias, scale = (integers(M, seed=seed, limit=2, dtype=dtype) for seed in (3, 4))
    mask = (torch.arange(M) % 3 > 0) | (2 * groups * k > M)
    scaled, masked = {"latent_scale": scale, "latent_mask": mask}, {"latent_mask": mask}
    for activation, vectors in (("relu", {}), ("none", scaled), ("abs", masked)):
        options = {"k": k, "activation": activation}
        code = fastsparse.topk_encode(x, weight, bias, groups=groups, **options, **vectors)
        right = reference.topk_encode(x, weight, bias, **options, **vectors, groups=groups)
        assert all(map(torch.equal, code, right))
        for g, its in enumerate(torch.arange(M).chunk(groups)):
            its_vectors = {name: vector[its] for name, vector in vectors.items()}
            part = fastsparse.topk_encode(x, weight[its], bias[its], **options, **its_vectors)
            mine = slice(g * k, (g + 1) * k)
            assert torch.equal(code.values[:, mine], part.values)
            assert torch.equal(code.indices[:, mine], part.indices + its[0])


def test_the_largest_of_every_group(backend):
    """GroupMax: the groups' first maxima, of any numbers."""
    x, weight = random(70, 24, seed=1), random(1024, 24, seed=2)
    values, indices = fastsparse.topk_encode(x, weight, k=1, groups=32, activation="none")
    scores = x.double() @ weight.double().T
    largest = scores.unflatten(1, (32, 32)).max(dim=2)
    assert torch.equal(indices, largest.indices + 32 * torch.arange(32))
    torch.testing.assert_close(values.double(), largest.values, rtol=1e-4, atol=1e-4)


def test_groups_that_cannot_be_had(backend):
    x, weight, mask = torch.ones(2, 3), torch.ones(12, 3), torch.arange(12) < 9
    for groups in (0, -1, 5, 24):
        with pytest.raises(
            ValueError, match=rf"^topk_encode: groups must be at least 1.*, got groups={groups}$"
        ):
            fastsparse.topk_encode(x, weight, k=1, groups=groups)
    with pytest.raises(TypeError, match=r"topk_encode: groups must be an int, got 2\.0"):
        fastsparse.topk_encode(x, weight, k=1, groups=2.0)
    with pytest.raises(ValueError, match=r"k must be between 1 and .* of every group \(4\), got k=5"):
        fastsparse.topk_encode(x, weight, k=5, groups=3)
    with pytest.raises(ValueError, match=r"k must be between 1 and .* of every group \(1\), got k=2"):
        fastsparse.topk_encode(x, weight, k=2, groups=3, latent_mask=mask)
    with pytest.raises(ValueError, match=r"groups must be at least 1 .* latents \(12\), got groups=5"):
        torch.ops.fastsparse.topk_encode(x, weight, None, 1, 0, None, None, 5)


# Properties.

sizes = st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(1, 40)).flatmap(
    lambda three: st.tuples(*map(st.just, three), st.integers(1, three[2]))
)


@given(
    data=st.data(),
    shape=sizes,
    activation=st.sampled_from(["relu", "none", "abs"]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_numbers(backend, data, shape, activation, dtype):
    N, D, M, k = shape
    x, weight, bias, scale = (data.draw(tensors(size)).to(dtype) for size in ((N, D), (M, D), (M,), (M,)))
    mask = data.draw(tensors(M, st.booleans(), "bool"))
    mask[torch.randperm(M, generator=torch.Generator().manual_seed(0))[:k]] = True
    bias, scale, mask = (data.draw(st.sampled_from([None, optional])) for optional in (bias, scale, mask))
    encode(x, weight, bias, k=k, activation=activation, latent_scale=scale, latent_mask=mask)


@given(shape=sizes, seed=st.integers(0, 2**31))
def test_tokens_are_independent_and_k_nests(backend, shape, seed):
    N, D, M, k = shape
    x, weight = integers(N, D, seed=seed), integers(M, D, seed=seed + 1)
    values, indices = fastsparse.topk_encode(x, weight, k=M, activation="none")
    some = fastsparse.topk_encode(x.flip(0), weight, k=k, activation="none")
    assert torch.equal(some.values.flip(0), values[:, :k])
    assert torch.equal(some.indices.flip(0), indices[:, :k])
