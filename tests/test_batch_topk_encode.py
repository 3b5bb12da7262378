"""batch_topk_encode on every backend: the largest of a whole batch, wherever in it they are."""

import pytest
import torch
from backends import backend_names, running
from hypothesis import given
from hypothesis import strategies as st
from oracle import DTYPES, LAYOUTS, assert_batch_topk, integers, laid_out, random
from strategies import tensors
from test_topk_encode import DATA, NON_FINITE, overflowing_when_rounded

import fastsparse
from fastsparse import reference
from fastsparse.ops._library import OPS

# (N, D, M, total): around the edges of vectors and row blocks, and of what a pool has room for, 65,536 scores
# more than are wanted.
SHAPES = [
    *((7, 5, 33, total) for total in (1, 2, 32, 33, 34, 230, 231)),
    *((N, 17, M, N + 3) for N, M in ((1, 70), (2, 9), (15, 16), (16, 64), (17, 65), (33, 513))),
    (3, 0, 5, 4),
    (1, 1, 1, 1),
    (1, 3, 4099, 4099),
    (65, 3, 4099, 100),
    (65, 3, 4099, 90_000),
    (65, 3, 4099, 65 * 4099),
    (100, 64, 2048, 1600),
    *((N, 4, 130, 3 * N) for N in (2047, 2049, 4097)),
]
of_any_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


KERNELS = OPS["batch_topk_encode"].kernels
BACKENDS = [
    name
    for name in backend_names(screened=True)
    if name.split("-")[0] in (*KERNELS, "reference", "registered")
]


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    """Every backend that has a kernel, and the compiled one with its screen forced as well."""
    with running(request.param):
        yield request.param


def encode(x, weight, bias=None, *, total, **options):
    """Encode, and hold the answer against the exact scores."""
    code = fastsparse.batch_topk_encode(x, weight, bias, total=total, **options)
    assert_batch_topk(code, x, weight, bias, total=total, **options)
    return code


def assert_same_as_reference(x, weight, bias=None, *, total, activation="none", scale=None, mask=None):
    """Of exact scores: the flat stable sort."""
    code = fastsparse.batch_topk_encode(
        x, weight, bias, total=total, activation=activation, latent_scale=scale, latent_mask=mask
    )
    right = reference.batch_topk_encode(x, weight, bias, total, activation, scale, mask)
    for mine, theirs in zip(code, right, strict=True):
        assert torch.equal(mine.nan_to_num(123), theirs.nan_to_num(123))
    return code


@of_any_shape
def test_shapes(backend, shape):
    N, D, M, total = shape
    encode(random(N, D, seed=1), random(M, D, seed=2), random(M, seed=3), total=total)


@of_any_shape
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "none", "abs"])
@pytest.mark.parametrize("chosen", ["all", "scaled", "masked"])
def test_ties(backend, shape, dtype, activation, chosen):
    N, D, M, total = shape
    x, weight = integers(N, D, seed=1, limit=2, dtype=dtype), integers(M, D, seed=2, limit=2, dtype=dtype)
    bias = integers(M, seed=3, limit=1, dtype=dtype)
    scale = integers(M, seed=4, limit=2, dtype=dtype) if chosen == "scaled" else None
    mask = (torch.arange(M) % 3 > 0) | (torch.arange(M) == 0) if chosen == "masked" else None
    total = total if mask is None else min(total, N * int(mask.sum()))
    assert_same_as_reference(x, weight, bias, total=total, activation=activation, scale=scale, mask=mask)


@pytest.mark.parametrize("N", [33, 1025])
@pytest.mark.parametrize("direction", [1, 0, -1])
def test_sorted_and_constant_scores(backend, N, direction):
    # Ascending, everything beats the bound that came before; descending, nothing does; 0: all are tied.
    x, weight = torch.ones(N, 1), direction * torch.arange(200).float().unsqueeze(1)
    assert_same_as_reference(x, weight, total=5 * N)
    assert_same_as_reference(
        direction * torch.arange(N).float().unsqueeze(1), torch.ones(200, 1), total=5 * N
    )
    assert_same_as_reference(torch.full((N, 1), -torch.inf), torch.ones(200, 1), total=5 * N)


@pytest.mark.parametrize("activation", ["relu", "none", "abs"])
def test_of_one_token_it_is_topk_encode(backend, activation):
    x, weight = integers(1, 8, seed=1), integers(600, 8, seed=2)
    values, indices = fastsparse.topk_encode(x, weight, k=40, activation=activation)
    code = fastsparse.batch_topk_encode(x, weight, total=40, activation=activation)
    order = indices[0].argsort()
    assert torch.equal(code.indices, indices[0, order])
    assert torch.equal(code.values, values[0, order])
    assert code.offsets.tolist() == [0, 40]


@pytest.mark.parametrize("sigma", [0.0, 0.3, 3.0])
def test_rows_of_any_scale_and_order(backend, sigma):
    x = integers(60, 8, seed=1) * torch.exp2((sigma * random(60, 1, seed=2)).round())
    weight = integers(700, 8, seed=3) + 2.0**-9 * torch.arange(700).unsqueeze(1)  # few ties
    code = assert_same_as_reference(x, weight, total=300)
    assert code.code.row_counts().sum() == 300
    order = random(60, seed=4).argsort()
    again = assert_same_as_reference(x[order], weight, total=300)
    assert torch.equal(again.threshold, code.threshold)
    clear = code.values > code.threshold
    dense, theirs = (
        c.code._replace(values=c.values * (c.values > c.threshold)).to_dense(700) for c in (code, again)
    )
    assert clear.any()
    assert torch.equal(theirs, dense[order])


@pytest.mark.parametrize("activation", ["none", "abs"])
def test_its_threshold_gives_the_same_entries(backend, activation):
    x, weight = integers(40, 8, seed=1), integers(500, 8, seed=2) + 2.0**-9 * torch.arange(500).unsqueeze(1)
    code = assert_same_as_reference(x, weight, total=160, activation=activation)
    below = float(code.threshold.nextafter(torch.tensor(-torch.inf)))
    with fastsparse.use_backend("reference"):
        found = fastsparse.threshold_encode(x, weight, threshold=below, activation=activation)
    tied = len(found.values) - 160  # behind the last that were selected
    assert tied == 0
    for mine, theirs in zip(code.code, found, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of_x", LAYOUTS)
@pytest.mark.parametrize("of_weight", LAYOUTS)
def test_layouts(backend, dtype, of_x, of_weight):
    x, weight = random(19, 37, seed=1, dtype=dtype), random(523, 37, seed=2, dtype=dtype)
    bias, scale = random(523, seed=3, dtype=dtype), random(523, seed=4, dtype=dtype)
    options = {"latent_scale": laid_out(scale, "strided"), "latent_mask": random(523, seed=5) > 0}
    for activation in ("relu", "abs"):
        encode(
            laid_out(x, of_x), laid_out(weight, of_weight), bias, total=90, activation=activation, **options
        )


@pytest.mark.parametrize("data", DATA)
def test_hostile_data(backend, data):
    x, weight, bias = DATA[data](random(48, 64, seed=1), random(2100, 64, seed=2), random(2100, seed=3))
    for activation in ("none", "abs"):
        encode(x, weight, bias, total=700, activation=activation)


@pytest.mark.parametrize("how", ["summed", "scaled"])
def test_keys_that_overflow_when_rounded(backend, how):
    arguments, best = overflowing_when_rounded(how, 1, 200, 1100)
    code = fastsparse.batch_topk_encode(**arguments, total=20)
    assert code.indices.tolist() == sorted(best)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "none", "abs"])
@pytest.mark.parametrize("bad", NON_FINITE)
@pytest.mark.parametrize("where", ["x", "weight", "bias", "latent_scale"])
@pytest.mark.parametrize("total", [40, 5000])
def test_non_finite(backend, where, bad, activation, dtype, total):
    inputs = {"x": random(40, 16, seed=1), "weight": random(1100, 16, seed=2), "bias": random(1100, seed=3)}
    inputs["latent_scale"] = random(1100, seed=4) if where == "latent_scale" else torch.ones(1100)
    inputs[where][torch.arange(len(inputs[where])) % 13 == 5] = bad  # whole rows of x and weight
    encode(**{name: tensor.to(dtype) for name, tensor in inputs.items()}, total=total, activation=activation)


def test_nan_is_the_largest(backend):
    x, weight = random(40, 16, seed=1), random(1100, 16, seed=2)
    x[7, 3] = torch.nan
    code = fastsparse.batch_topk_encode(x, weight, total=1000)
    assert code.indices.tolist() == list(range(1000))
    assert code.values.isnan().all()
    assert code.threshold.isnan()
    assert code.code.row_counts().nonzero().tolist() == [[7]]


# Gradients.


def derivatives(encode, inputs, upstream):
    """First ones, and those of their sum of squares."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    first = torch.autograd.grad(encode(*leaves)[0], leaves, upstream, create_graph=True)
    return *first, *torch.autograd.grad(sum(d.square().sum() for d in first), leaves[:2])


@pytest.mark.parametrize("activation", ["relu", "none", "abs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_derivatives_equal_the_differentiated_reference(backend, activation, dtype):
    # Integers: forward and backward are exact, so equality is too.
    x, weight = integers(21, 8, seed=1, dtype=dtype), integers(90, 8, seed=2, dtype=dtype)
    bias, scale = integers(90, seed=3, dtype=dtype), integers(90, seed=4, dtype=dtype)
    mask, upstream = torch.arange(90) % 4 > 0, integers(700, seed=5, dtype=dtype)  # down to negative scores
    ours = derivatives(
        lambda x, weight, bias: fastsparse.batch_topk_encode(
            x, weight, bias, total=700, activation=activation, latent_scale=scale, latent_mask=mask
        ),
        (x, weight, bias),
        upstream,
    )
    right = derivatives(
        lambda *leaves: reference.batch_topk_encode(*leaves, 700, activation, scale, mask),
        (x, weight, bias),
        upstream,
    )
    for mine, theirs in zip(ours, right, strict=True):
        assert torch.equal(mine, theirs)


# What is refused.


@pytest.mark.parametrize("total", [0, -1, 22])
def test_total_out_of_range(backend, total):
    message = rf"total must be between 1 and .* eligible latents \(7\) .*\(3\), got total={total}"
    with pytest.raises(ValueError, match=f"batch_topk_encode: {message}"):
        fastsparse.batch_topk_encode(torch.ones(3, 5), torch.ones(7, 5), total=total)
    with pytest.raises(ValueError, match=message):
        torch.ops.fastsparse.batch_topk_encode(torch.ones(3, 5), torch.ones(7, 5), None, total, 0, None, None)


def test_refusals(backend):
    x, weight = torch.ones(3, 5), torch.ones(7, 5)
    for total in (1.5, "2", None, True):
        with pytest.raises(TypeError, match="batch_topk_encode: total must be an int"):
            fastsparse.batch_topk_encode(x, weight, total=total)
    with pytest.raises(ValueError, match=r"eligible latents \(2\) .*\(3\), got total=7"):
        fastsparse.batch_topk_encode(x, weight, total=7, latent_mask=torch.arange(7) < 2)
    with pytest.raises(ValueError, match=r"got total=1"):
        fastsparse.batch_topk_encode(x[:0], weight, total=1)
    with pytest.raises(ValueError, match="activation must be one of"):
        fastsparse.batch_topk_encode(x, weight, total=1, activation="gelu")
    with pytest.raises(ValueError, match="batch_topk_encode: x must have shape"):
        fastsparse.batch_topk_encode(x[:, :4], weight, total=1)


# Properties.


def test_threads_change_no_bit(backend, threads):
    if not backend.startswith("cpu"):
        pytest.skip("threads are of CPUs")
    x, weight = integers(300, 16, seed=1), integers(1000, 16, seed=2) / 8
    found = []
    for count in (1, 2, 3, 7):
        threads(count)
        found.append(fastsparse.batch_topk_encode(x, weight, total=5000))
    for code in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(code, found[0], strict=True))


@given(
    data=st.data(),
    shape=st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(1, 40)),
    activation=st.sampled_from(["relu", "none", "abs"]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_numbers(backend, data, shape, activation, dtype):
    N, D, M = shape
    x, weight, bias, scale = (data.draw(tensors(size)).to(dtype) for size in ((N, D), (M, D), (M,), (M,)))
    mask = data.draw(tensors(M, st.booleans(), "bool"))
    mask[data.draw(st.integers(0, M - 1))] = True
    bias, scale, mask = (data.draw(st.sampled_from([None, optional])) for optional in (bias, scale, mask))
    total = data.draw(st.integers(1, N * (M if mask is None else int(mask.sum()))))
    encode(x, weight, bias, total=total, activation=activation, latent_scale=scale, latent_mask=mask)


def random_call(draw) -> int:
    """For `make fuzz`."""
    M, D = draw.size("M", 5000), draw.size("D", 1200)
    N = draw.size("N", draw.work / (M * D) ** 0.5 / 20)
    x, weight = draw.numbers("x", N, D), draw.numbers("weight", M, D)
    bias = draw.numbers("bias", M) if draw.flag("biased") else None
    scale = draw.numbers("scales", M) if draw.flag("scaled", 0.3) else None
    mask = None
    if draw.flag("masked", 0.3):
        mask = torch.rand(M, generator=draw.generator) < draw.choice((0.1, 0.9))
        mask[draw.randrange(M)] = True
    total = draw.say("total", draw.randint(1, N * draw.size("k", M if mask is None else int(mask.sum()))))
    options = {"total": total, "activation": draw.choose("activation", ("relu", "none", "abs"))}
    options |= {"latent_scale": scale, "latent_mask": mask}
    code = draw.run(lambda: fastsparse.batch_topk_encode(x, weight, bias, **options))
    assert_batch_topk(code, x, weight, bias, **options)
    return N
