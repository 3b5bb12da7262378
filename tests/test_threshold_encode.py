"""threshold_encode on every backend: what is above its threshold, all of it, and nothing else."""

import math

import pytest
import torch
import torch.nn.functional as F
from backends import backend_names, running
from hypothesis import given
from hypothesis import strategies as st
from knobs import turned
from oracle import DTYPES, LAYOUTS, assert_within, exact_scores, integers, laid_out, random, shapes
from strategies import tensors
from torch import Tensor

import fastsparse
from fastsparse import reference
from fastsparse.backend import _cpu

# (N, D, M), around the edges of vectors, row blocks (8, 16, 64, 2048) and of stripes (256 to 1024).
SHAPES = [
    *shapes(
        (2, 7, 8, 9, 15, 16, 17, 33, 63, 65),
        (1, 2, 7, 8, 15, 16, 17, 31, 33, 65, 257),
        (2, 7, 8, 15, 16, 17, 31, 33, 255, 257, 1023, 1025),
    ),
    *((N, 4, 130) for N in (2047, 2049, 4097)),
    (0, 16, 32),
    (3, 0, 5),
    (3, 4, 0),
    (0, 0, 0),
    (1, 1, 1),
    (40, 70, 8200),
]


@pytest.fixture(params=backend_names(screened=True))
def backend(request) -> str:
    """Every backend, and the compiled one with its screen forced as well."""
    with running(request.param):
        yield request.param


def assert_code(
    code, x, weight, bias=None, *, threshold, margin=0.0, activation="none", latent_mask=None,
    max_entries=None,
):  # fmt: skip
    """The code is what its own values say, and all that exceeds a threshold by more than rounding."""
    values, indices, offsets = code
    (N, M), wide = (len(x), len(weight)), torch.promote_types(x.dtype, torch.float32)
    entries, counts = int(offsets[-1]), offsets.diff()
    assert offsets.shape == (N + 1,)
    assert offsets[0] == 0
    assert (counts >= 0).all()
    assert values.shape == indices.shape == (entries if max_entries is None else max_entries,)
    assert (values.dtype, indices.dtype, offsets.dtype) == (wide, torch.int64, torch.int64)
    assert all(part.is_contiguous() for part in code)
    assert (values[entries:] == 0).all()
    assert (indices[entries:] == 0).all()

    rows, latents, values = torch.arange(N).repeat_interleave(counts), indices[:entries], values[:entries]
    assert ((latents >= 0) & (latents < M)).all()
    assert ((rows * M + latents).diff() > 0).all(), "a row's latents don't ascend"
    scores, error = exact_scores(x, weight, bias)
    assert_within(values, scores[rows, latents], error[rows, latents])
    bound = torch.as_tensor(threshold).to(wide).expand(M) - margin
    keys = scores.abs() if activation == "abs" else scores
    own = values.abs() if activation == "abs" else values
    assert not (own <= bound[latents]).any(), "a value is at most its threshold"
    eligible = torch.ones(M, dtype=torch.bool) if latent_mask is None else latent_mask
    found = torch.zeros(N, M, dtype=torch.bool).index_put((rows, latents), torch.tensor(True))
    above = keys.isnan() | ((keys - error > bound) & error.isfinite())  # where sums may overflow, all goes
    below = (keys + error <= bound) & error.isfinite()
    assert (found | ~(above & eligible)).all(), "an entry is missing"
    assert not (found & (below | ~eligible)).any(), "an entry is too much"


def encode(x, weight, bias=None, **options):
    """Encode, and hold the answer against the exact scores."""
    code = fastsparse.threshold_encode(x, weight, bias, **options)
    assert_code(code, x, weight, bias, **options)
    return code


def assert_same_as_reference(x, weight, bias=None, *, threshold, activation="none", latent_mask=None):
    """Where sums are exact: the answer is one, and every backend must give it."""
    code = fastsparse.threshold_encode(
        x, weight, bias, threshold=threshold, activation=activation, latent_mask=latent_mask
    )
    bounds = torch.as_tensor(threshold).to(code.values.dtype).expand(len(weight))
    right = reference.threshold_encode(x, weight, bias, bounds, activation == "abs", latent_mask)
    torch.testing.assert_close(tuple(code), right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_shapes(backend, shape):
    N, D, M = shape
    threshold = random(M, seed=4, scale=D**0.5).abs() + 0.3
    encode(random(N, D, seed=1), random(M, D, seed=2), random(M, seed=3), threshold=threshold)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of_x", LAYOUTS)
@pytest.mark.parametrize("of_weight", LAYOUTS)
@pytest.mark.parametrize("activation", ["none", "abs"])
def test_layouts(backend, dtype, of_x, of_weight, activation):
    x, weight = random(19, 37, seed=1, dtype=dtype), random(523, 37, seed=2, dtype=dtype)
    bias, threshold, mask = (
        random(523, seed=3, dtype=dtype),
        random(523, seed=4, scale=9),
        random(523, seed=5),
    )
    of_vector = "strided" if of_x == "transposed" else of_x
    encode(
        laid_out(x, of_x),
        laid_out(weight, of_weight),
        laid_out(bias, of_vector),
        threshold=laid_out(threshold, of_vector),
        margin=0.25,
        activation=activation,
        latent_mask=torch.stack((mask > 0, mask < 0), 1)[:, 0],
    )


THRESHOLDS = {
    "zero": 0.0,
    "negative": -3.0,
    "high": 12.0,
    "never": math.inf,
    "always": -math.inf,
    "of all kinds": torch.linspace(-20, 20, 1100).index_fill(0, torch.arange(0, 1100, 7), math.inf),
    "sparse, then dense": torch.where(torch.arange(1100) < 1050, 25.0, -5.0),
}


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("margin", [0.0, 1.5])
@pytest.mark.parametrize("activation", ["none", "abs"])
@pytest.mark.parametrize("mask", ["all", "some", "one", "none"])
def test_thresholds(backend, threshold, margin, activation, mask):
    masks = {
        "all": None,
        "some": torch.arange(1100) % 3 > 0,
        "one": torch.arange(1100) == 1001,
        "none": torch.zeros(1100, dtype=torch.bool),
    }
    x, weight, bias = random(40, 70, seed=1), random(1100, 70, seed=2), random(1100, seed=3)
    options = {"margin": margin, "activation": activation, "latent_mask": masks[mask]}
    encode(x, weight, bias, threshold=THRESHOLDS[threshold], **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["none", "abs"])
@pytest.mark.parametrize("masked", [True, False])
def test_ties_are_out(backend, dtype, activation, masked):
    x, weight = (integers(*size, seed=1, limit=2, dtype=dtype) for size in ((33, 16), (1030, 16)))
    bias, threshold = integers(1030, seed=3, limit=1, dtype=dtype), integers(1030, seed=4, limit=12)
    mask = torch.arange(1030) % 3 > 0 if masked else None
    for bound in (threshold, 0.0, 5.0, -5.0):
        options = {"activation": activation, "latent_mask": mask}
        assert_same_as_reference(x, weight, bias, threshold=bound, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["none", "abs"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["x", "weight", "bias"])
@pytest.mark.parametrize("threshold", [15.0, math.inf])
def test_non_finite(backend, where, bad, activation, dtype, threshold):
    inputs = {"x": random(40, 16, seed=1), "weight": random(1100, 16, seed=2), "bias": random(1100, seed=3)}
    inputs[where][torch.arange(len(inputs[where])) % 13 == 5] = bad  # whole rows of x and weight
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    encode(**inputs, threshold=threshold, activation=activation)


def test_nan_comes_out_in_its_own_row_alone(backend):
    x, weight = random(40, 70, seed=1), random(1100, 70, seed=2)
    x[7, 3] = torch.nan
    values, indices, offsets = encode(x, weight, threshold=math.inf)
    assert offsets.tolist() == [0] * 8 + [1100] * 33
    assert torch.equal(indices, torch.arange(1100))
    assert values.isnan().all()


@pytest.mark.parametrize("size", [1e-20, 1e15, 1e30])
def test_what_bf16_gets_wrong(backend, size):
    """Rows of all sizes, latents that differ by little, and numbers that bf16 has no room for."""
    x, weight = random(48, 64, seed=1) * torch.logspace(-9, 3, 48).unsqueeze(1), random(1, 64, seed=2)
    weight = weight + 2.0**-14 * random(1100, 64, seed=3)
    scores = x[24].double() @ weight.double().T
    encode(x * size, weight, threshold=float(scores.median()) * size)
    encode(torch.full((20, 2), 3.4e38), torch.full((1100, 2), 0.25), threshold=1.69e38)


@pytest.mark.parametrize("k", [1, 9])
def test_just_below_the_kth_score_it_is_topk(backend, k):
    x, weight, bias = random(1, 70, seed=1), random(2100, 70, seed=2), random(2100, seed=3)
    values, indices = fastsparse.topk_encode(x, weight, bias, k=k + 1, activation="none")
    middle = values.double()[0, k - 1 : k + 1].mean().item()
    code = encode(x, weight, bias, threshold=middle)
    order = indices[0, :k].argsort()
    assert torch.equal(code.indices, indices[0, :k][order])
    torch.testing.assert_close(code.values, values[0, :k][order])


def test_below_all_it_is_linear(backend):
    x, weight, bias = integers(20, 8, seed=1), integers(600, 8, seed=2), integers(600, seed=3)
    code = fastsparse.threshold_encode(x.view(4, 5, 8), weight, bias, threshold=-math.inf)
    assert torch.equal(code.values.view(20, 600), F.linear(x, weight, bias))
    assert torch.equal(code.to_dense(600), F.linear(x, weight, bias))


def test_max_entries(backend):
    x, weight = integers(40, 16, seed=1), integers(1100, 16, seed=2)
    values, indices, offsets = encode(x, weight, threshold=20.0)
    entries = len(values)
    assert 100 < entries < 20000
    for room in (entries, entries + 1, entries + 1000):
        code = encode(x, weight, threshold=20.0, max_entries=room)
        assert torch.equal(code.values[:entries], values)
        assert torch.equal(code.indices[:entries], indices)
        assert torch.equal(code.offsets, offsets)
    assert encode(x, weight, threshold=math.inf, max_entries=0).offsets.tolist() == [0] * 41
    for room in (entries - 1, 7, 0):
        message = (
            rf"^threshold_encode: max_entries must be at least .* \({entries}\), got max_entries={room}$"
        )
        with pytest.raises(RuntimeError, match=message):
            fastsparse.threshold_encode(x, weight, threshold=20.0, max_entries=room)


def test_more_entries_than_memory():
    if not fastsparse.backends()["cpu"].available:
        pytest.skip("the compiled kernel alone asks for what is free")
    x, weight = torch.ones(600, 1), torch.ones(16384, 1)
    everything = {"threshold": -math.inf}
    with turned(_cpu.library, free_bytes=1 << 26):
        with pytest.raises(
            RuntimeError, match=r"^threshold_encode: \d+ entries so far need .* give max_entries$"
        ):
            fastsparse.threshold_encode(x, weight, **everything)
        with pytest.raises(RuntimeError, match=r"number of entries \(9830400\), got max_entries=9$"):
            fastsparse.threshold_encode(x, weight, **everything, max_entries=9)
    assert len(fastsparse.threshold_encode(x, weight, **everything).values) == 9830400


@pytest.mark.parametrize("activation", ["none", "abs"])
def test_gradients(backend, activation):
    x, weight, bias = (
        integers(*size, seed=seed, dtype=torch.float64).requires_grad_()
        for seed, size in enumerate(((5, 4), (11, 4), (11,)))
    )
    threshold = torch.arange(11) % 9 + 0.5  # far from all scores, which are integers

    def values(*leaves: Tensor) -> Tensor:
        options = {"threshold": threshold, "activation": activation, "max_entries": 55}
        return fastsparse.threshold_encode(*leaves, **options).values

    assert (values(x, weight, bias) != 0).sum() > 5
    assert torch.autograd.gradcheck(values, (x, weight, bias))
    assert torch.autograd.gradgradcheck(values, (x, weight, bias))


def test_no_gradient_to_thresholds(backend):
    threshold, x = (
        random(9, seed=2).requires_grad_(),
        random(5, 4, seed=1, dtype=torch.bfloat16).requires_grad_(),
    )
    values, *_ = fastsparse.threshold_encode(
        x, random(9, 4, seed=3, dtype=torch.bfloat16), threshold=threshold
    )
    values.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert threshold.grad is None


@pytest.mark.parametrize("level", [0.5, 2.5, 3.5])
def test_threads_do_not_matter(backend, threads, level):
    if not backend.startswith("cpu"):
        pytest.skip("this is about the CPU's threads")
    x, weight, found = random(300, 64, seed=1), random(4000, 64, seed=2), []
    for count in (1, 2, 3):
        threads(count)
        found.append(fastsparse.threshold_encode(x, weight, threshold=level * 8))
    for other in found[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[0], other, strict=True))


REFUSED = {
    "x (..., D)": (ValueError, "x must have shape", {"x": torch.zeros(2, 5)}),
    "a dtype": (TypeError, "x must be", {"x": torch.zeros(2, 4, dtype=torch.int64)}),
    "another dtype": (ValueError, "weight must have the dtype", {"weight": torch.zeros(9, 4).double()}),
    "bias (M,)": (ValueError, "bias must have shape", {"bias": torch.zeros(8)}),
    "threshold (M,)": (ValueError, "threshold must have shape", {"threshold": torch.zeros(8)}),
    "no number": (TypeError, "threshold must be a tensor or a float, got", {"threshold": "0"}),
    "NaN": (ValueError, r"NaN, got it at \[8\]", {"threshold": torch.tensor([0.0] * 8 + [math.nan])}),
    "NaN for all": (ValueError, r"NaN, got it at \[0\]", {"threshold": math.nan}),
    "a negative margin": (ValueError, "margin must be", {"margin": -1.0}),
    "an infinite margin": (ValueError, "margin must be", {"margin": math.inf}),
    "relu": (ValueError, "activation must be one of", {"activation": "relu"}),
    "latent_mask (M,)": (ValueError, "latent_mask must have shape", {"latent_mask": torch.ones(8).bool()}),
    "a mask of floats": (TypeError, "latent_mask must be", {"latent_mask": torch.ones(9)}),
    "negative max_entries": (ValueError, "max_entries must be at least 0", {"max_entries": -1}),
    "half an entry": (TypeError, "max_entries must be an int", {"max_entries": 0.5}),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(backend, what):
    error, message, changed = REFUSED[what]
    given = {"x": torch.ones(2, 4), "weight": torch.ones(9, 4)} | changed
    with pytest.raises(error, match=f"^threshold_encode: .*{message}"):
        fastsparse.threshold_encode(**given)


@given(
    data=st.data(),
    shape=st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 40)),
    activation=st.sampled_from(["none", "abs"]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_numbers(backend, data, shape, activation, dtype):
    N, D, M = shape
    x, weight, bias = (data.draw(tensors(size)).to(dtype) for size in ((N, D), (M, D), (M,)))
    threshold = data.draw(tensors(M)).nan_to_num(0.0, math.inf, -math.inf)
    mask = data.draw(tensors(M, st.booleans(), "bool"))
    bias, mask = (data.draw(st.sampled_from([None, optional])) for optional in (bias, mask))
    encode(x, weight, bias, threshold=threshold, activation=activation, latent_mask=mask)


def random_call(draw) -> int:
    M = draw.size("M", 5000)
    D = draw.size("D", 1200)
    N = draw.size("N", draw.work / (M * D) ** 0.5 / 20)
    x, weight = draw.numbers("x", N, D), draw.numbers("weight", M, D)
    bias = draw.numbers("bias", M) if draw.flag("biased") else None
    scores = (x.double() @ weight.double().T).nan_to_num(0.0).flatten().sort().values
    wide, place = (
        torch.promote_types(draw.dtype, torch.float32),
        draw.choose("level", (0, 0.5, 0.95, 0.999, 1)),
    )
    threshold = scores[int((N * M - 1) * place)].clamp(torch.finfo(wide).min, torch.finfo(wide).max).to(wide)
    if draw.flag("by latent"):
        threshold = threshold * (1 + 0.1 * draw.gaussian(M).to(wide))
        threshold[draw.integers(0, M, 1 + M // 50)] = draw.choose("some", (torch.inf, -torch.inf, 0.0))
    (threshold,) = draw.flushed(threshold.expand(M))
    options = {"threshold": threshold, "activation": draw.choose("activation", ("none", "abs"))}
    if draw.flag("masked", 0.3):
        options["latent_mask"] = torch.rand(M, generator=draw.generator) < draw.choice((0.1, 0.9))
    if draw.flag("limited", 0.3):
        options["max_entries"] = N * M
    code = draw.run(lambda: fastsparse.threshold_encode(x, weight, bias, **options))
    assert_code(code, x, weight, bias, **options)
    return N
