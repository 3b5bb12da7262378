"""topk_encode in CUDA C++ where its blocks, its screen or its large k show, each from little work."""

import ctypes
from dataclasses import replace

import pytest
import torch
from backends import GPU_BACKENDS, missing, running
from knobs import turned
from oracle import assert_topk, integers, random
from test_topk_encode import DATA, assert_same_as_reference

import fastsparse
from fastsparse._options import ACTIVATIONS
from fastsparse.ops._library import OPS

BACKENDS = [name for name, gpu in GPU_BACKENDS.items() if gpu.library is not None and not missing(name)]
D, M = 3, 2777


@pytest.fixture(params=[name + mode for name in BACKENDS for mode in ("", "-screened")])
def library(request) -> ctypes.CDLL:
    with running(request.param):
        yield GPU_BACKENDS[request.param.removesuffix("-screened")].library()


@pytest.fixture(params=["whole", "cut"])
def blocks(request, library):
    """Calls in one block, and in blocks of 7 tokens and 512 latents."""
    with turned(library, **({"rows": 7, "bytes": 1} if request.param == "cut" else {})):
        yield


@pytest.mark.parametrize(
    ("dtype", "k"),
    [
        (torch.float32, 1),
        (torch.float32, 33),
        (torch.float32, 200),
        (torch.bfloat16, 33),
        (torch.float64, 200),
    ],
    ids=str,
)
def test_ties_across_blocks(blocks, dtype, k):
    x, weight = integers(23, D, seed=1, limit=2, dtype=dtype), integers(M, D, seed=2, limit=2, dtype=dtype)
    bias, scale = integers(M, seed=3, limit=1, dtype=dtype), integers(M, seed=4, limit=2, dtype=dtype)
    assert_same_as_reference(x, weight, bias, k=k, activation="none")
    options = {"latent_scale": scale, "latent_mask": torch.arange(M) % 5 == 3}
    assert_same_as_reference(x, weight, bias, k=k, activation="abs", **options)


def test_every_latent_beats_those_before(blocks):
    weight = (torch.arange(M) // 16).float().unsqueeze(1)
    assert_same_as_reference(torch.ones(9, 1), weight, k=17)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("k", [1024, 1025, M])
def test_large_k(blocks, dtype, k):
    x, weight = integers(5, D, seed=1, limit=2, dtype=dtype), integers(M, D, seed=2, limit=2, dtype=dtype)
    assert_same_as_reference(x, weight, k=k, activation="none")
    weight[::7] = torch.nan
    assert_same_as_reference(x, weight, k=k, activation="none")


@pytest.mark.parametrize("k", [8, 1200])
def test_too_few_eligible_leave_zeros_on_other_latents(library, k, monkeypatch):
    # Only a CUDA graph gets so far: nobody counts the eligible ones there.
    monkeypatch.setitem(OPS, "topk_encode", replace(OPS["topk_encode"], check=None))
    eligible = torch.zeros(M, dtype=torch.bool)
    eligible[[5, 900, 2700]] = True
    x, weight = integers(4, D, seed=1), integers(M, D, seed=2)
    unchanged = ACTIVATIONS.index("none")
    values, indices = torch.ops.fastsparse.topk_encode(x, weight, None, k, unchanged, None, eligible, 1)
    for row in indices.tolist():
        assert set(row[:3]) == {5, 900, 2700}
        assert len(set(row)) == k
    assert (values[:, 3:] == 0).all()


@pytest.mark.parametrize("D", [16384, 16388])
def test_widest_rows(library, D):
    # A screen's refinement keeps a token in shared memory, of which the smallest GPU has enough for 16384.
    x, weight = integers(2, D, seed=1, limit=2), integers(40, D, seed=2, limit=2)
    assert_same_as_reference(x, weight, k=3, activation="none")


@pytest.mark.parametrize("of", ["x", "weight"])
def test_bracket_holds_where_rounding_errors_add_up(library, of):
    # One latent's score is 0 in bf16 and .225 exactly, all of it lost to rounding; another's is .2.
    D, rounded_off = 64, 0.9 * 2.0**-8
    signs = 1.0 - 2.0 * (torch.arange(D) % 2)
    near = 1.5 + rounded_off * signs  # 1.5 in bf16
    x, best = (near, signs) if of == "x" else (signs, near)
    weight = torch.zeros(500, D)
    weight[7, 0] = 0.2 / x[0]
    weight[321] = best
    code = fastsparse.topk_encode(x.repeat(3, 1), weight, k=1, activation="none")
    assert code.indices.flatten().tolist() == [321] * 3


def test_a_launch_leaves_larger_ones_their_shared_memory(library):
    # The emulator refuses to take any back, as another thread may be about to launch with it.
    for D in (200, 16384, 64):
        x, weight = integers(3, D, seed=1, limit=2), integers(40, D, seed=2, limit=2)
        assert_same_as_reference(x, weight, None, k=4)


def test_screen_leaves_the_few_rows_that_it_cannot_decide_to_exact_scores(blocks):
    # Tokens with an infinity, and latents closer together than bf16 can tell.
    x, weight = random(40, 64, seed=1), random(M, 64, seed=2)
    x[::9] = x[::9] * 1e38 * 10
    bias = random(M, seed=3)
    assert_topk(fastsparse.topk_encode(x, weight, bias, k=9), x, weight, bias, k=9)
    near = weight[:1] + 2.0**-14 * weight
    assert_topk(fastsparse.topk_encode(x[1:9], near, k=9), x[1:9], near, k=9)


@pytest.fixture(params=BACKENDS)
def screened(request) -> ctypes.CDLL:
    with running(request.param + "-screened"):
        yield GPU_BACKENDS[request.param].library()


@pytest.fixture
def undecided(screened):
    """How many rows the first and the second screen of the last call in one block have left undecided."""
    device = "cuda" if screened is GPU_BACKENDS["cuda-gpu"].library() else "cpu"
    counts = torch.full((2,), -1, dtype=torch.int32, device=device)
    with turned(screened, undecided=counts.data_ptr()):
        yield counts


def spread(exponent: int) -> torch.Tensor:
    """Latents around one of them."""
    return random(1, 64, seed=2) + 2.0**exponent * random(M, 64, seed=3)


@pytest.mark.parametrize(("exponent", "left"), [(0, [0, 0]), (-11, [40, 0]), (-20, [40, 40])])
def test_each_screen_decides_what_it_can(undecided, exponent, left):
    x, weight, bias = random(40, 64, seed=1), spread(exponent), 2.0**exponent * random(M, seed=4)
    assert_topk(fastsparse.topk_encode(x, weight, bias, k=9), x, weight, bias, k=9)
    assert undecided.tolist() == left
    options = {"activation": "abs", "latent_mask": random(M, seed=5) > -1}
    options["latent_scale"] = 1 + 2.0**exponent * random(M, seed=6)
    assert_topk(fastsparse.topk_encode(x, weight, k=9, **options), x, weight, k=9, **options)
    assert undecided.tolist() == left


def test_rows_of_each_kind_in_one_call(undecided):
    weight = torch.cat((spread(-11), random(M, 64, seed=5)), dim=1)
    x = random(40, 128, seed=1)
    x[::2, 64:], x[1::2, :64] = 0, 0  # the even rows are for the second screen
    x[[3, 4, 33, 34]] = torch.inf  # these for none
    assert_topk(fastsparse.topk_encode(x, weight, k=9), x, weight, k=9)
    assert undecided.tolist() == [22, 4]


def test_equal_atoms_tie_in_the_second_screen(undecided):
    code = fastsparse.topk_encode(random(9, 64, seed=1), spread(-11).repeat(2, 1), k=8, activation="none")
    assert undecided.tolist() == [9, 0]
    assert torch.equal(code.indices[:, 1::2], code.indices[:, ::2] + M)
    assert torch.equal(code.values[:, 1::2], code.values[:, ::2])


@pytest.mark.parametrize("D", [6, 63, 70])
@pytest.mark.parametrize("data", DATA)
def test_hostile_data_in_the_second_screen(screened, undecided, data, D):
    x, weight, bias = DATA[data](random(7, D, seed=1), random(900, D, seed=2), random(900, seed=3))
    with turned(screened, screening=2):
        for activation in ("none", "abs"):
            code = fastsparse.topk_encode(x, weight, bias, k=5, activation=activation)
            assert_topk(code, x, weight, bias, k=5, activation=activation)
            assert undecided[0] == 7


def test_closer_bracket_holds_where_rounding_errors_add_up(screened, undecided):
    # Low parts times low parts, which the second screen leaves out, decide: they are twice the other's lead.
    D, low = 64, 0.9 * 2.0**-8
    near = 1.5 + low * (1.0 - 2.0 * (torch.arange(D) % 2))  # 1.5 in bf16
    weight = torch.zeros(500, D)
    weight[321] = near
    weight[7] = 1.5
    weight[7, 0] += D * low**2 / 2 / 1.5
    with turned(screened, screening=2, accumulation=0):
        code = fastsparse.topk_encode(near.repeat(3, 1), weight, k=1, activation="none")
    assert code.indices.flatten().tolist() == [321] * 3
    assert undecided.tolist() == [3, 0]
