"""matching_pursuit on every backend: greedy steps, exact coefficients, early stops, reversible gradients."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from backends import backend_names, running
from hypothesis import given
from hypothesis import strategies as st
from knobs import knobs
from oracle import DTYPES, LAYOUTS, assert_pursuit, clear_rows, integers, laid_out, random
from strategies import tensors

import fastsparse
from fastsparse import reference
from fastsparse._validation import UNIT_NORM_TOLERANCE
from fastsparse.backend import _cpu

METHODS = ("direct", "gram")
COMPILED = [name for name in backend_names(screened=True) if name != "reference"]
methods = pytest.mark.parametrize("method", METHODS)
FORMS = list(itertools.product([False, True], repeat=2))  # nonnegative, normalized
# Every two of method, nonnegative and normalized meet.
WAYS = [("direct", False, False), ("direct", True, True), ("gram", False, True), ("gram", True, False)]
ways = pytest.mark.parametrize(
    ("method", "nonnegative", "normalized"),
    WAYS,
    ids=["direct-signed", "direct-nonnegative-unit", "gram-signed-unit", "gram-nonnegative"],
)

# (N, D, M, k), around the edges of vectors, row blocks and stripes, each of them once.
SHAPES = [
    *((1, 1, 129, 3), (2, 2, 127, 7), (7, 7, 65, 8), (8, 8, 63, 16), (15, 15, 33, 2), (16, 16, 31, 33)),
    *((17, 17, 2049, 3), (31, 31, 17, 3), (32, 33, 513, 2), (33, 63, 511, 1), (63, 65, 16, 4)),
    *((65, 257, 15, 2), (129, 12, 8, 3), (257, 13, 7, 3), (1025, 12, 70, 4), (5, 12, 1025, 3), (3, 9, 2, 70)),
    *((0, 16, 32, 4), (3, 0, 5, 2), (1, 1, 1, 1), (2, 3, 1, 5), (33, 64, 1500, 12)),
]


@pytest.fixture(params=backend_names(screened=True))
def backend(request) -> str:
    with running(request.param):
        yield request.param


def unit(dictionary: torch.Tensor) -> torch.Tensor:
    """Atoms of norm 1 to the dtype's precision; zero atoms stay."""
    wide = dictionary.double()
    return (wide / wide.norm(dim=1, keepdim=True).clamp_min(1e-300)).to(dictionary.dtype)


def problem(N, D, M, *, seed=1, dtype=torch.float32, normalized=False):
    """Tokens, and atoms of norms between about 0.3 and 3, or 1."""
    x, dictionary = random(N, D, seed=seed, dtype=dtype), random(M, D, seed=seed + 1, dtype=dtype)
    if normalized:
        return x, unit(dictionary)
    return x, unit(dictionary) * random(M, 1, seed=seed + 2).clamp(-1.2, 1.2).exp().to(dtype)


def pursue(x, dictionary, *, k, method="auto", **options):
    """Pursue, and hold every step against exact scores."""
    pursuit = fastsparse.matching_pursuit(x, dictionary, k=k, method=method, **options)
    assert_pursuit(pursuit, x, dictionary, k=k, **options)
    return pursuit


@methods
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_shapes(backend, shape, method):
    N, D, M, k = shape
    nonnegative, normalized = FORMS[SHAPES.index(shape) % 4]
    x, dictionary = problem(N, D, M, normalized=normalized)
    pursue(x, dictionary, k=k, method=method, nonnegative=nonnegative, normalized=normalized)


@methods
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_dtypes(backend, dtype, method):
    shapes = (17, 33, 129, 7), (65, 40, 600, 9), (1, 1, 1, 1), (3, 0, 5, 2)
    for (N, D, M, k), (nonnegative, normalized) in zip(shapes, FORMS, strict=True):
        x, dictionary = problem(N, D, M, dtype=dtype, normalized=normalized)
        pursue(x, dictionary, k=k, method=method, nonnegative=nonnegative, normalized=normalized)


@pytest.mark.parametrize("of_x", LAYOUTS)
def test_layouts(backend, of_x):
    """Every two of layouts, dtypes and methods."""
    for i, of_dictionary in enumerate(LAYOUTS):
        for shift, method in enumerate(METHODS):
            x, dictionary = problem(19, 37, 211, dtype=DTYPES[(i + LAYOUTS.index(of_x) + shift) % 4])
            pursue(laid_out(x, of_x), laid_out(dictionary, of_dictionary), k=5, method=method)


@methods
def test_expanded_inputs(backend, method):
    x, dictionary = random(1, 37, seed=1).expand(40, 37), random(1, 37, seed=2).expand(600, 37)
    pursue(x, problem(1, 37, 600)[1], k=4, method=method)
    _, indices, _ = pursue(x, dictionary, k=3, method=method)
    assert (indices[:, 0] == 0).all(), "equal scores: the lowest atom"


# What matching pursuit is.


@ways
def test_it_is_the_textbooks_loop(backend, method, nonnegative, normalized):
    """Row by row, a Python loop in fp64; then fp32, on the rows where it can't choose otherwise."""
    x, dictionary = problem(60, 24, 150, normalized=normalized)
    x64, dictionary64 = x.double(), dictionary.double()
    options = {"k": 6, "nonnegative": nonnegative, "normalized": normalized}
    values, indices, residual = fastsparse.matching_pursuit(x64, unit(dictionary64), method=method, **options)
    for n in range(0, 60, 7):
        r = x64[n].clone()
        for t in range(6):
            scores = [float(w @ r) for w in unit(dictionary64)]
            j = max(range(150), key=lambda m: scores[m] if nonnegative else abs(scores[m]))
            assert indices[n, t] == j
            assert float(values[n, t]) == pytest.approx(scores[j], rel=1e-12)
            r -= scores[j] * unit(dictionary64)[j]
        torch.testing.assert_close(residual[n], r, atol=1e-12, rtol=0)

    right, clear = clear_rows(x, dictionary, **options)
    assert clear.float().mean() > 0.9
    found = fastsparse.matching_pursuit(x, dictionary, method=method, **options)
    assert torch.equal(found.indices[clear], right[clear])


@methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_pursued_in_fp32(backend, dtype, method):
    """As the same numbers in fp32 are, and rounded once, wherever fp32 can't choose otherwise."""
    x, dictionary = problem(80, 24, 150, dtype=dtype)
    options = {"k": 6, "nonnegative": False, "normalized": False}
    right, clear = clear_rows(x, dictionary, **options)
    assert clear.float().mean() > 0.9
    half = fastsparse.matching_pursuit(x, dictionary, method=method, **options)
    full = fastsparse.matching_pursuit(x.float(), dictionary.float(), method=method, **options)
    assert torch.equal(half.indices[clear], right[clear])
    for rounded, exact in ((half.values, full.values), (half.residual, full.residual)):
        error = (rounded.float() - exact).abs()
        bound = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).tiny + 1e-5
        assert (error <= bound)[clear].all()


@methods
def test_a_long_pursuit(backend, method):
    """By unit atoms the energy adds up, and ever less is left."""
    x, dictionary = problem(150, 64, 500, normalized=True)
    values, _, residual = pursue(x, dictionary, k=48, normalized=True, method=method)
    energy = x.double().square().sum(1)
    parts = values.double().square().sum(1) + residual.double().square().sum(1)
    # Every step may be off by eps of what was left of the row, and its atom's norm by as much.
    torch.testing.assert_close(parts, energy, rtol=8 * torch.finfo(torch.float32).eps, atol=0)
    assert (residual.norm(dim=1) < 0.1 * x.norm(dim=1)).all()


@methods
@pytest.mark.parametrize("normalized", [False, True])
def test_more_steps_than_dimensions(backend, normalized, method):
    """The residual goes to rounding level and stays there."""
    x, dictionary = problem(9, 5, 40, normalized=normalized)
    values, _, residual = pursue(x, dictionary, k=90, normalized=normalized, method=method)
    assert residual.abs().max() < 1e-5
    assert values.isfinite().all()


# Exact numbers: the answer is one, and every backend must give it.


def signs(rows: int, D: int, *, seed: int) -> torch.Tensor:
    """Entries -1 and 1: atoms of norm sqrt(D), a power of two here, so that all is exact in fp32."""
    return 2.0 * (random(rows, D, seed=seed) > 0) - 1


def assert_same_as_reference(x, dictionary, *, k, method="auto", **options):
    found = fastsparse.matching_pursuit(x, dictionary, k=k, method=method, **options)
    right = reference.matching_pursuit(x, dictionary, k, **options)
    for mine, theirs in zip(found, right, strict=True):
        assert torch.equal(mine.nan_to_num(123.0), theirs.nan_to_num(123.0))
    return found


@ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties(backend, dtype, method, nonnegative, normalized):
    shapes = (40, 4, 9, 6), (33, 16, 700, 4), (5, 4, 2049, 5)
    N, D, M, k = shapes[(DTYPES.index(dtype) + 2 * nonnegative + normalized) % 3]
    x = integers(N, D, seed=1).to(dtype)
    dictionary = signs(M, D, seed=2) * (1 / D**0.5 if normalized else 2.0 ** integers(M, 1, seed=3, limit=1))
    dictionary = dictionary.to(dtype)
    options = {"nonnegative": nonnegative, "normalized": normalized}
    assert_same_as_reference(x, dictionary, k=k, method=method, **options)


@methods
def test_an_atom_may_be_taken_again(backend, method):
    third = 3**0.5 / 2
    dictionary = torch.tensor([[1.0, 0.0], [0.5, third]])
    values, indices, residual = pursue(torch.tensor([[0.0, 1.0]]), dictionary, k=5, method=method)
    assert indices.tolist() == [[1, 0, 1, 0, 1]]
    torch.testing.assert_close(
        values, third * torch.tensor([[1.0, -0.5, 0.25, -0.125, 0.0625]]), rtol=1e-5, atol=0
    )
    assert residual.norm() < 0.06


@ways
def test_zero_atoms_are_never_taken(backend, method, nonnegative, normalized):
    x, dictionary = problem(30, 8, 40, normalized=normalized)
    dictionary[::3] = 0
    options = {"nonnegative": nonnegative, "normalized": normalized, "method": method}
    values, indices, _ = pursue(x, dictionary, k=6, **options)
    assert (indices[values != 0] % 3 != 0).all()
    values, indices, residual = pursue(x, 0 * dictionary, k=3, **options)
    assert not values.any()
    assert not indices.any()
    assert torch.equal(residual, x)


@methods
def test_a_coefficient_that_rounds_to_zero_is_no_step(backend, method):
    x = torch.tensor([[1.0, 0.0]])
    values, _, residual = pursue(x, torch.tensor([[1.0, 1e30]]), k=2, method=method)
    assert not values.any()
    assert torch.equal(residual, x)


@methods
def test_a_row_stops_where_no_atom_helps(backend, method):
    eye = torch.eye(4)[:3]
    x = torch.tensor(
        [[1.0, -2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0]]
    )
    signed = assert_same_as_reference(x, eye, k=5, method=method)
    assert signed.values.tolist() == [[3, -2, 1, 0, 0], [0] * 5, [0] * 5, [-1, 0, 0, 0, 0]]
    assert signed.indices.tolist() == [[2, 1, 0, 0, 0], [0] * 5, [0] * 5, [0] * 5]
    assert signed.residual.tolist() == [[0, 0, 0, 4], [0, 0, 0, 1], [0] * 4, [0] * 4]
    positive = assert_same_as_reference(x, eye, k=5, nonnegative=True, method=method)
    assert positive.values.tolist() == [[3, 1, 0, 0, 0], [0] * 5, [0] * 5, [0] * 5]
    assert positive.residual.tolist() == [[0, -2, 0, 4], [0, 0, 0, 1], [0] * 4, [-1, 0, 0, 0]]


@ways
def test_tolerance(backend, method, nonnegative, normalized):
    x, dictionary = problem(70, 9, 60, normalized=normalized)
    x[0] = 0
    options = {"nonnegative": nonnegative, "normalized": normalized}
    for tol in (1e-3, 0.3, 2.0, 1e30):
        values, _, residual = pursue(x, dictionary, k=40, tol=tol, method=method, **options)
        steps = (values != 0).sum(1)
        length = residual.norm(dim=1)
        if not nonnegative:
            assert ((length <= tol * 1.001) | (steps == 40)).all()
        if tol == 0.3:
            assert len(steps.unique()) > 3, "each row stops on its own"
    assert torch.equal(residual, x)
    assert residual.data_ptr() != x.data_ptr()
    assert not steps.any()


@methods
def test_the_tolerance_is_reached_exactly(backend, method):
    x = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 5.0], [6.0, 0.0, 5.0]])
    found = assert_same_as_reference(x, torch.eye(3), k=3, tol=5.0, method=method)
    assert found.values.tolist() == [[0, 0, 0], [0, 0, 0], [6, 0, 0]]


@pytest.mark.parametrize("of", ["x", "dictionary", "both"])
def test_huge_and_tiny(backend, of):
    for i, (scale, method) in enumerate(itertools.product((1e-30, 1e-18, 1e12, 1e18), METHODS)):
        x, dictionary = problem(20, 16, 90)
        x = x * (scale if of != "dictionary" else 1)
        dictionary = dictionary * (scale if of != "x" else 1)
        values, _, _ = pursue(x, dictionary, k=5, nonnegative=i % 4 in (1, 2), method=method)
        if of != "both":
            assert values.all()


@methods
def test_rows_and_atoms_of_all_sizes(backend, method):
    x, dictionary = problem(40, 16, 300)
    x = x * torch.logspace(-12, 12, 40).unsqueeze(1)
    dictionary = dictionary * torch.logspace(-10, 10, 300).roll(77).unsqueeze(1)
    for nonnegative in (False, True):
        pursue(x, dictionary, k=8, nonnegative=nonnegative, method=method)


@methods
def test_atoms_rounded_in_another_dtype(backend, method):
    """Their norms are as good as that one can have them, and the codes are right for them."""
    bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
    for rounded_to, dtype in ((bf16, fp32), (fp16, fp32), (bf16, fp16), (bf16, fp64), (fp32, fp64)):
        x, dictionary = problem(30, 4, 400, dtype=rounded_to, normalized=True)
        drift = UNIT_NORM_TOLERANCE[rounded_to] / 4
        atoms = ((1 + drift) * dictionary.double()).to(rounded_to).to(dtype)
        off = (atoms.double().norm(dim=1) - 1).abs().max()
        assert UNIT_NORM_TOLERANCE[dtype] < off < UNIT_NORM_TOLERANCE[rounded_to]
        pursue(x.to(dtype), atoms, k=6, method=method, normalized=True)


# Data on which scores kept up to date go astray unless they are checked.
@methods
def test_atoms_close_together(backend, method):
    for spread in (2.0**-14, 2.0**-8, 0.1):
        x, dictionary = problem(40, 16, 400)
        dictionary = unit(dictionary[:1] + spread * dictionary)
        pursue(x, dictionary, k=12, method=method, normalized=True)
        pursue(x + 50 * dictionary[3], dictionary, k=12, method=method)


@methods
def test_a_residual_far_below_its_row(backend, method):
    """Of 1e4, the first steps leave 1e-2: scores kept up to date would be off by as much."""
    x, dictionary = problem(30, 16, 200, normalized=True)
    dictionary[:4] = torch.eye(16)[:4]
    x = torch.cat((1e4 * x[:, :4], 1e-2 * x[:, 4:]), dim=1)
    dictionary[4:, :4] = 0
    pursue(x, unit(dictionary), k=12, method=method, normalized=True)


# NaN and infinities.


@ways
def test_nan_tokens_surface_and_stay_in_their_rows(backend, method, nonnegative, normalized):
    x, dictionary = problem(20, 8, 50, normalized=normalized)
    options = {"k": 3, "nonnegative": nonnegative, "normalized": normalized, "method": method}
    clean = fastsparse.matching_pursuit(x, dictionary, **options)
    x[7, 3] = torch.nan
    values, indices, residual = fastsparse.matching_pursuit(x, dictionary, tol=1e-6, **options)
    assert values[7].isnan().all()
    assert residual[7].isnan().all()
    assert indices[7].tolist() == [0, 0, 0]
    others = torch.arange(20) != 7
    assert torch.equal(indices[others], clean.indices[others])
    torch.testing.assert_close(values[others], clean.values[others])
    torch.testing.assert_close(residual[others], clean.residual[others])
    assert_first_step(x, dictionary, values, indices, nonnegative, normalized)


def assert_first_step(x, dictionary, values, indices, nonnegative, normalized):
    """matching_pursuit_step takes it too, and leaves NaN of the rows where that is taken."""
    step = fastsparse.matching_pursuit_step(x, dictionary, nonnegative=nonnegative, normalized=normalized)
    torch.testing.assert_close(step[0], values[:, 0], equal_nan=True)
    assert torch.equal(step[1], indices[:, 0])
    assert torch.equal(step[2].isnan().all(1), values[:, 0].isnan())


@ways
def test_a_nan_atom_is_the_largest(backend, method, nonnegative, normalized):
    x, dictionary = problem(20, 8, 50, normalized=normalized)
    dictionary[[31, 17], 2] = torch.nan
    options = {"nonnegative": nonnegative, "normalized": normalized, "method": method}
    values, indices, residual = fastsparse.matching_pursuit(x, dictionary, k=3, **options)
    assert (indices[:, 0] == 17).all()
    assert values.isnan().all()
    assert residual.isnan().all()
    assert (indices[:, 1:] == 0).all()
    assert_first_step(x, dictionary, values, indices, nonnegative, normalized)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf])
@pytest.mark.parametrize(("method", "dtype"), [("direct", torch.float32), ("gram", torch.bfloat16)], ids=str)
def test_infinities_stay_in_their_rows(backend, bad, dtype, method):
    x, dictionary = problem(20, 8, 50, dtype=dtype)
    clean = fastsparse.matching_pursuit(x, dictionary, k=3, method=method)
    x[7, 3] = bad
    values, indices, residual = fastsparse.matching_pursuit(x, dictionary, k=3, method=method)
    assert not values[7].isfinite().any()
    assert not residual[7].isfinite().all()
    others = torch.arange(20) != 7
    assert torch.equal(indices[others], clean.indices[others])
    torch.testing.assert_close(values[others], clean.values[others])
    spoiled = dictionary.clone()
    spoiled[11, 1] = bad
    values, indices, _ = fastsparse.matching_pursuit(x, spoiled, k=3, method=method)
    assert (indices[others, 0] == 11).all()
    assert not values.isfinite().any()


# Determinism, and what is left alone.


def near_twins(M, D, *, dtype):
    """Five of every atom, some equal, some off by a unit or two in the last place of their entries."""
    dictionary = random(M // 5, D, seed=2, dtype=dtype).repeat(5, 1)
    off = torch.finfo(dtype).eps * integers(M, D, seed=3, limit=2).to(dtype)
    off[: M // 5] = off[2 * M // 5 : 3 * M // 5] = 0
    return (dictionary * (1 + off))[torch.randperm(M, generator=torch.Generator().manual_seed(4))]


def assert_same_bits(runs):
    first, *others = ([tensor.nan_to_num(123.0) for tensor in run] for run in runs)
    for other in others:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(other, first, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "D"), [(5, 8), (40, 52)])  # a CPU searches for few, and multiplies for many
@pytest.mark.parametrize("name", [name for name in COMPILED if "triton" not in name])
def test_neither_method_nor_batch_nor_threads_change_a_bit(name, threads, N, D, dtype):
    """Not even where rounding decides: that of one sum in one order, whatever ruled the other atoms out."""
    nonnegative, normalized = FORMS[(DTYPES.index(dtype) + (N == 40)) % 4]
    x, dictionary = random(N, D, seed=1, dtype=dtype), near_twins(150, D, dtype=dtype)
    x[0] = 0
    dictionary = unit(dictionary) if normalized else dictionary
    options = {"k": 6, "nonnegative": nonnegative, "normalized": normalized, "tol": 0.1}
    with running(name):
        runs = [pursue(x, dictionary, method=method, **options) for method in METHODS]
        threads(2)
        for method in (*METHODS, "auto"):
            parts = [
                fastsparse.matching_pursuit(part, dictionary, method=method, **options)
                for part in x.split(N // 2 + 1)
            ]
            runs.append([torch.cat(part) for part in zip(*parts, strict=True)])
    assert_same_bits(runs)


@pytest.mark.parametrize(("nonnegative", "normalized"), FORMS)
@pytest.mark.parametrize("name", [name for name in COMPILED if "triton" in name])
def test_near_twins_in_triton(name, nonnegative, normalized):
    """As above, of fewer: the interpreter is slow, and its atoms are fp32 whatever the input's dtype."""
    x, dictionary = random(6, 20, seed=1), near_twins(140, 20, dtype=torch.float32)
    dictionary = unit(dictionary) if normalized else dictionary
    options = {"k": 2, "nonnegative": nonnegative, "normalized": normalized}
    with running(name):
        assert_same_bits([pursue(x, dictionary, method=method, **options) for method in METHODS])


@methods
def test_a_dictionary_that_changes_in_place(backend, method):
    """Nothing kept of a dictionary outlives it: neither a change nor another one at the same place."""
    x, dictionary = problem(20, 8, 50)
    for seed in range(4):
        with torch.no_grad():
            dictionary.copy_(problem(20, 8, 50, seed=10 + seed)[1])
        pursue(x, dictionary, k=4, method=method)
        pursue(x, dictionary, k=4, method=method)
        dictionary.view(torch.uint8).numpy()[::7] ^= 1  # past PyTorch's count of versions
        pursue(x, dictionary, k=4, method=method)
    for seed in range(4):
        pursue(x, problem(20, 8, 50, seed=20 + seed)[1], k=4, method=method)


# Gradients.


@pytest.mark.parametrize(  # every two of them meet
    ("method", "nonnegative", "normalized", "tol"),
    [*((*way, 0.4 if i else 0.0) for i, way in enumerate(WAYS)), ("gram", True, True, 0.0)],
)
def test_gradcheck(backend, method, nonnegative, normalized, tol):
    x, dictionary = problem(6, 4, 9, seed=15, dtype=torch.float64, normalized=normalized)
    if nonnegative:  # a row that no atom helps
        dictionary[:, 0] = dictionary[:, 0].abs() + 0.2
        dictionary, x[0] = unit(dictionary) if normalized else dictionary, torch.tensor([-3.0, 0, 0, 0])
    options = {"nonnegative": nonnegative, "normalized": normalized, "tol": tol, "method": method}
    values, indices, _ = fastsparse.matching_pursuit(x, dictionary, k=6, **options)
    assert values[values != 0].abs().min() > 1e-3, "no step turns into none when gradcheck moves the inputs"
    taken = indices.masked_fill(values == 0, -1).sort(dim=1).values
    assert ((taken.diff(dim=1) == 0) & (taken[:, 1:] >= 0)).any(), "an atom is taken twice"
    if tol or nonnegative:
        assert (values == 0).any(), "a row stops early"
    leaves = x.requires_grad_(), dictionary.requires_grad_()

    def through(*leaves):
        values, _, residual = fastsparse.matching_pursuit(*leaves, k=6, **options)
        return values.sin(), residual.cos()

    assert torch.autograd.gradcheck(through, leaves)


@pytest.mark.parametrize(
    ("dtype", "method", "nonnegative", "normalized"),
    [(dtype, *WAYS[(i + j) % 4]) for i, dtype in enumerate(DTYPES) for j in (0, 1)],
    ids=str,
)
def test_gradients_are_those_of_the_differentiated_reference(backend, dtype, method, nonnegative, normalized):
    """The reference remembers every residual, ours rebuilds them; halves do so from what was rounded."""
    x, dictionary = problem(40, 12, 60, dtype=dtype, normalized=normalized)
    upstream = random(40, 5, seed=5), random(40, 12, seed=6)

    def gradients(function, dtype):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, dictionary)]
        values, indices, residual = function(*leaves)
        outs = [
            (out.double() * up.double()).sum() for out, up in zip((values, residual), upstream, strict=True)
        ]
        return (indices, *torch.autograd.grad(sum(outs), leaves))

    indices, *ours = gradients(
        lambda x, w: fastsparse.matching_pursuit(
            x, w, k=5, nonnegative=nonnegative, normalized=normalized, method=method
        ),
        dtype,
    )
    same, *exact = gradients(
        lambda x, w: reference.matching_pursuit(x, w, 5, 0.0, nonnegative, normalized), torch.float64
    )
    if not torch.equal(indices, same):
        rows = (indices != same).any(dim=1)
        pytest.skip(f"rows {rows.nonzero().flatten().tolist()} choose otherwise in {dtype}")
    # Forward and backward round at each of the steps; halves once more, at the values and the residual.
    accuracy = {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 6 * torch.finfo(dtype).eps)
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.dtype == dtype
        error = (mine.double() - theirs).abs()
        assert error.max() <= accuracy * theirs.abs().max()


def test_unused_slots_have_no_gradient(backend):
    """Not even one that isn't finite."""
    x = torch.tensor([[2.0, 0.0], [0.0, 3.0]], requires_grad=True)
    dictionary = torch.eye(2).requires_grad_()
    values, _, residual = fastsparse.matching_pursuit(x, dictionary, k=3)
    assert values.tolist() == [[2, 0, 0], [3, 0, 0]]
    upstream = torch.tensor([[1.0, torch.nan, torch.inf], [5.0, 7.0, torch.nan]])
    torch.autograd.backward((values, residual), (upstream, torch.zeros(2, 2)))
    assert x.grad.tolist() == [[1, 0], [0, 5]]
    assert dictionary.grad.isfinite().all()


def test_upstream_gradients_of_any_layout(backend):
    x, dictionary = (leaf.requires_grad_() for leaf in problem(7, 5, 20))
    values, _, residual = fastsparse.matching_pursuit(x, dictionary, k=3)

    def gradients(ups):
        return torch.autograd.grad((values, residual), (x, dictionary), ups, retain_graph=True)

    for layout in ("expanded", "transposed", "strided"):
        ups = [random(*t.shape, seed=3) for t in (values, residual)]
        if layout == "expanded":
            ups = [up[:1, :1].expand(up.shape) for up in ups]
        laid = [up if layout == "expanded" else laid_out(up, layout) for up in ups]
        torch.testing.assert_close(gradients(laid), gradients([up.contiguous() for up in ups]))


def test_a_reconstruction_and_its_gradient(backend):
    """Decoding the code gives x less its residual, and the two ways to it have one gradient."""
    grads = []
    for decode in (True, False):
        x, dictionary = (leaf.requires_grad_() for leaf in problem(9, 6, 20, dtype=torch.float64))
        values, indices, residual = fastsparse.matching_pursuit(x, dictionary, k=4)
        out = fastsparse.sparse_decode(values, indices, dictionary) if decode else x - residual
        torch.testing.assert_close(out, x - residual)
        grads.append(torch.autograd.grad(out.square().sum(), (x, dictionary)))
    torch.testing.assert_close(*grads)


def test_memory_does_not_grow_with_k():
    """Backward keeps the outputs and the dictionary: no tensor saved is larger than those."""
    x, dictionary = (leaf.requires_grad_() for leaf in problem(50, 30, 200))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        fastsparse.matching_pursuit(x, dictionary, k=20)
    assert sorted(saved) == sorted([50 * 20, 50 * 20, 50 * 30, 200 * 30])


# Coalescing.


def merged_by_hand(values, indices):
    values, indices = values.clone(), indices.clone()
    for row, latents in zip(values, indices, strict=True):
        first = {}
        for j, m in enumerate(latents.tolist()):
            if first.setdefault(m, j) != j:
                row[first[m]] += row[j]
                row[j] = latents[j] = 0
    return values, indices


def test_coalesce(backend):
    x, dictionary = problem(25, 3, 6, dtype=torch.float64)
    for k in (1, 2, 3, 7, 8, 33):
        plain = fastsparse.matching_pursuit(x, dictionary, k=k, tol=0.05)
        merged = fastsparse.matching_pursuit(x, dictionary, k=k, tol=0.05, coalesce=True)
        values, indices = merged_by_hand(plain.values, plain.indices)
        torch.testing.assert_close(merged.values, values)
        assert torch.equal(merged.indices, indices)
        assert torch.equal(merged.residual, plain.residual)
        used = merged.indices.masked_fill(merged.values == 0, -1).sort(dim=1).values
        assert not ((used.diff(dim=1) == 0) & (used[:, 1:] >= 0)).any()
        decoded = fastsparse.sparse_decode(merged.values, merged.indices, dictionary)
        torch.testing.assert_close(decoded, x - plain.residual)
    assert ((plain.values != 0) & (merged.values == 0)).any(), "something was merged"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_coalesce_sums_halves_in_fp32(dtype):
    from fastsparse.functional.pursuit import _coalesced

    values, indices = torch.ones(1, 1001, dtype=dtype), torch.full((1, 1001), 3)
    merged, kept = _coalesced(values, indices)
    assert merged[0, 0] == torch.tensor(1001.0).to(dtype)
    assert kept[0, 0] == 3
    assert not merged[0, 1:].any()
    assert not kept[0, 1:].any()


# Properties.

shapes = st.tuples(st.integers(1, 6), st.integers(0, 6), st.integers(1, 20), st.integers(1, 8))


@given(
    data=st.data(),
    shape=shapes,
    nonnegative=st.booleans(),
    tol=st.sampled_from([0.0, 0.5]),
    dtype=st.sampled_from(DTYPES),
    method=st.sampled_from(METHODS),
)
def test_any_numbers(backend, data, shape, nonnegative, tol, dtype, method):
    N, D, M, k = shape
    x, dictionary = (data.draw(tensors(size)).to(dtype) for size in ((N, D), (M, D)))
    pursue(x, dictionary, k=k, tol=tol, nonnegative=nonnegative, method=method)


@given(shape=shapes, seed=st.integers(0, 2**31), nonnegative=st.booleans(), method=st.sampled_from(METHODS))
def test_tokens_are_independent_and_k_nests(backend, shape, seed, nonnegative, method):
    N, _, M, k = shape
    x, dictionary = integers(N, 4, seed=seed), signs(M, 4, seed=seed + 1)
    options = {"nonnegative": nonnegative, "method": method}
    whole = fastsparse.matching_pursuit(x, dictionary, k=k + 2, **options)
    some = fastsparse.matching_pursuit(x.flip(0), dictionary, k=k, **options)
    assert torch.equal(some.values.flip(0), whole.values[:, :k])
    assert torch.equal(some.indices.flip(0), whole.indices[:, :k])


# Bad input.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be at least 1, got k=0"),
        ({"k": True}, TypeError, "k must be an int, got True of type bool"),
        ({"k": 2.0}, TypeError, "k must be an int, got 2.0 of type float"),
        ({"tol": -1e-9}, ValueError, "tol must be finite and at least 0, got tol=-1e-09"),
        ({"tol": float("nan")}, ValueError, "tol must be finite and at least 0, got tol=nan"),
        ({"tol": float("inf")}, ValueError, "tol must be finite and at least 0, got tol=inf"),
        ({"tol": "0"}, TypeError, "tol must be a float, got '0' of type str"),
        ({"nonnegative": 1}, TypeError, "nonnegative must be a bool, got 1 of type int"),
        ({"normalized": None}, TypeError, "normalized must be a bool, got None of type NoneType"),
        ({"coalesce": "no"}, TypeError, "coalesce must be a bool, got 'no' of type str"),
        ({"method": "fast"}, ValueError, "method must be one of auto, direct, gram, got 'fast'"),
        (
            {"dictionary": torch.ones(0, 5)},
            ValueError,
            r"dictionary must hold at least one atom, got shape \(0, 5\)",
        ),
        (
            {"dictionary": torch.eye(5) * torch.tensor([1.0, 1.0, 3.0, 0.5, 1.0]), "normalized": True},
            ValueError,
            r"dictionary must have atoms of norm 1 \(to 0.0003\), got norm 3 at atom 2; .* normalized=False",
        ),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"x": torch.ones(3, 5), "dictionary": torch.eye(5), "k": 2} | change
    with pytest.raises(error, match=rf"^matching_pursuit: {message}"):
        fastsparse.matching_pursuit(**arguments)
    if change.keys() <= {"dictionary", "nonnegative", "normalized"}:
        with pytest.raises(error, match=rf"^matching_pursuit_step: {message}"):
            fastsparse.matching_pursuit_step(torch.ones(3, 5), **({"dictionary": torch.eye(5)} | change))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalised_dictionaries_pass(dtype):
    """What normalising in a dtype leaves, zero atoms and NaN included; not what misses by more."""
    dictionary = unit(random(300, 200, seed=1, dtype=dtype))
    dictionary[7] = 0
    dictionary[9, 3] = torch.nan
    x = torch.ones(1, 200, dtype=dtype)
    fastsparse.matching_pursuit(x, dictionary, k=1, normalized=True)
    dictionary[20] *= 1.03
    with pytest.raises(ValueError, match=r"got norm 1\.0[23].* at atom 20"):
        fastsparse.matching_pursuit(x, dictionary, k=1, normalized=True)
    with pytest.raises(ValueError, match=r"^matching_pursuit_step: .* at atom 20"):
        fastsparse.matching_pursuit_step(x, dictionary, normalized=True)


def test_a_gram_matrix_that_does_not_fit(backend):
    x, dictionary = torch.ones(1, 1), torch.ones(1, 1).expand(4_000_000, 1)
    message = r"^matching_pursuit: the Gram matrix .* fit into the \d+\.\d\d GiB .* got one of 59604.64 GiB"
    with pytest.raises(ValueError, match=message):
        fastsparse.matching_pursuit(x, dictionary, k=2, method="gram")
    found = fastsparse.matching_pursuit(x, dictionary, k=2)  # falls to direct
    assert found.values.tolist() == [[1, 0]]


# What the CPU keeps between calls.


@pytest.fixture
def kept_atoms(monkeypatch):
    """How many atoms the kept Gram matrix has; none at first."""
    if not fastsparse.backends()["cpu"].available:
        pytest.skip("no compiled kernels")
    monkeypatch.setenv("FASTSPARSE_GRAM_BYTES", "0")
    pursue(*problem(3, 4, 5), k=2)  # drops what other tests left
    monkeypatch.delenv("FASTSPARSE_GRAM_BYTES")
    assert knobs(_cpu.library).kept_atoms == 0
    return lambda: knobs(_cpu.library).kept_atoms


def test_a_gram_matrix_is_kept_within_its_limit(kept_atoms, monkeypatch):
    x, dictionary = problem(20, 16, 90)
    first = pursue(x, dictionary, k=5, method="gram")
    assert kept_atoms() == 90
    again = fastsparse.matching_pursuit(x, dictionary.clone(), k=5, method="gram")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, first, strict=True))
    pursue(x, dictionary[:50], k=5, method="direct")
    assert kept_atoms() == 90
    pursue(x, dictionary[:50], k=5, method="gram")
    assert kept_atoms() == 50
    monkeypatch.setenv("FASTSPARSE_GRAM_BYTES", str(4 * 50 * 50 - 1))
    for method in ("gram", "auto"):
        pursue(x, dictionary[:50], k=5, method=method)
        assert kept_atoms() == 0
    for wrong in ("1 GiB", "-1"):
        monkeypatch.setenv("FASTSPARSE_GRAM_BYTES", wrong)
        with pytest.raises(ValueError, match=f"^FASTSPARSE_GRAM_BYTES: must be a number .* got '{wrong}'"):
            fastsparse.matching_pursuit(x, dictionary, k=5)


def test_auto_makes_a_gram_matrix_of_a_dictionary_that_stays(kept_atoms):
    """A few tokens at a time don't pay for one, but many such calls do; not if the dictionary changes."""
    x, dictionary = problem(16, 16, 200)
    for seed in range(12):
        fastsparse.matching_pursuit(x, problem(1, 16, 200, seed=seed)[1], k=4)
    assert kept_atoms() == 0
    fastsparse.matching_pursuit(x, dictionary, k=4)
    assert kept_atoms() == 0
    for _ in range(12):
        fastsparse.matching_pursuit(x, dictionary, k=4)
    assert kept_atoms() == 200
    pursue(x, dictionary, k=4)
    pursue(*problem(500, 16, 150), k=4)  # pays at once
    assert kept_atoms() == 150


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_what_was_called_before_changes_no_bit(kept_atoms, dtype):
    """The first call multiplies, the second finds the Gram matrix of another."""
    x, dictionary = random(40, 64, seed=1, dtype=dtype), near_twins(600, 64, dtype=dtype)
    runs = [fastsparse.matching_pursuit(x, dictionary, k=4)]
    assert kept_atoms() == 0
    fastsparse.matching_pursuit(x, dictionary, k=4, method="gram")
    assert kept_atoms() == 600
    runs.append(fastsparse.matching_pursuit(x, dictionary, k=4))
    assert_same_bits(runs)


def test_products_in_low_precision_choose_no_atom(kept_atoms):
    """Which is what PyTorch makes of fp32 products if it is let."""
    x, dictionary = problem(200, 64, 600)
    runs = [pursue(x, dictionary, k=4, method=method) for method in METHODS]
    try:
        torch.set_float32_matmul_precision("medium")
        runs += [pursue(x, dictionary, k=4, method=method) for method in METHODS]
        runs += [pursue(x, dictionary + 0, k=4, method=method) for method in METHODS]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_same_bits(runs)


def test_threads_share_what_is_kept(kept_atoms):
    """Each gets its own dictionary's answer, whichever is kept at the moment."""
    problems = [problem(30, 16, 200, seed=seed) for seed in range(3)]
    right = [fastsparse.matching_pursuit(*p, k=6, method="gram") for p in problems]

    def pursue_one(i: int) -> bool:
        found = fastsparse.matching_pursuit(*problems[i % 3], k=6, method="gram")
        return all(torch.equal(mine, theirs) for mine, theirs in zip(found, right[i % 3], strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(pursue_one, range(60)))
