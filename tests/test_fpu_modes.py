"""Every op in every mode of the floating-point unit: subnormals flushed, sums rounded in any direction.

Searches (topk_encode, matching_pursuit) are to give one answer in all modes; sums (the sparse products, the
recurrences) flush if their caller does, in all threads alike, and are rounded to nearest.
"""

from functools import partial

import pytest
import torch
from backends import host_backend_names, running
from float_modes import FLOAT_MODES, ORDINARY, current_mode, float_mode
from oracle import assert_pursuit, assert_topk, random
from recurrences import CELLS, assert_same_states, assert_states
from test_sparse_products import PRODUCTS

import fastsparse

modes = pytest.mark.parametrize("mode", FLOAT_MODES)
CPU = [name for name in host_backend_names(screened=True) if name.startswith("cpu")]
PLAIN = [name for name in CPU if name in host_backend_names()]
N, D, M, k = 20, 16, 600, 4


def tokens(kind: str):
    """Rows of a kind, and weights (M, D) with which their k-th best score is of that kind too."""
    x, weight = random(N, D, seed=1), random(M, D, seed=2)
    if kind == "zero":
        x[:] = 0
    elif kind == "signed zero":
        x, weight = torch.zeros(N, D), weight.abs()
        x[:, ::2] = -0.0
    elif kind == "k-th is zero":  # and fewer than k scores are more
        x, weight = x.abs(), -weight.abs()
        weight[5:] *= (torch.arange(M - 5) % 3 == 0)[:, None]
        weight[[7, 300]] *= -1
    elif kind == "subnormal":
        x *= 1e-41
    elif kind == "constant subnormal":
        x[:], weight[:] = 1e-42, 1
    elif kind == "tiny":  # products underflow
        x, weight = x * 1e-22, weight * 1e-20
    else:
        assert kind == "mixture"
        x *= torch.logspace(-45, 0, N)[:, None]
        weight *= torch.logspace(-30, 0, M)[torch.arange(M) * 7 % M][:, None]
        x[::5, ::3] = 0
    return x, weight


KINDS = ("zero", "signed zero", "k-th is zero", "subnormal", "constant subnormal", "tiny", "mixture")
kinds = pytest.mark.parametrize("kind", KINDS)


def assert_distinct(indices, below):
    """Valid, whatever they are."""
    assert indices.min() >= 0
    assert indices.max() < below
    ordered = indices.sort(dim=1).values
    assert (ordered[:, 1:] != ordered[:, :-1]).all()


def same_bits(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@kinds
@pytest.mark.parametrize("name", CPU)
def test_a_search_has_one_answer(threads, name, kind):
    threads(1)  # the library's products in other threads have the mode that these were made in
    x, weight = tokens(kind)
    searches = {
        "topk_encode": lambda: fastsparse.topk_encode(x, weight, k=k, activation="none"),
        "abs": lambda: fastsparse.topk_encode(x, weight, k=k, activation="abs", latent_scale=weight[:, 0]),
        "direct": lambda: fastsparse.matching_pursuit(x, weight, k=k, method="direct"),
        "gram": lambda: fastsparse.matching_pursuit(x, weight, k=k, method="gram"),
    }
    with running(name):
        for search in searches.values():
            ordinary = search()
            for mode in FLOAT_MODES:
                with float_mode(mode):
                    found = search()
                    assert current_mode() == mode, "the caller's mode was not given back"
                assert same_bits(found, ordinary), mode
        assert_topk(searches["topk_encode"](), x, weight, k=k, activation="none")
        assert_pursuit(searches["direct"](), x, weight, k=k)
        assert_pursuit(searches["gram"](), x, weight, k=k)


@pytest.mark.parametrize("kind", ["k-th is zero", "constant subnormal", "mixture"])
def test_a_search_is_well_formed_on_every_backend(backend, kind):
    """Also where the mode is that of NumPy and PyTorch, whose arithmetic the interpreter and products are."""
    x, weight = tokens(kind)
    with float_mode("flushed up"):
        values, indices = fastsparse.topk_encode(x, weight, k=k)
        pursuits = [fastsparse.matching_pursuit(x, weight, k=k, method=way) for way in ("direct", "gram")]
    assert_distinct(indices, M)
    assert values.isfinite().all()
    for _, chosen, residual in pursuits:
        assert chosen.min() >= 0
        assert chosen.max() < M
        assert residual.isfinite().all()


def sums(dtype):
    """Calls of the ops that only sum, forward and backward."""
    x, weight = random(9, 37, seed=6, dtype=dtype), random(30, 37, seed=7, dtype=dtype)
    a, b = random(3, 70, 11, seed=8, dtype=dtype, scale=0.5), random(3, 70, 11, seed=9, dtype=dtype)

    def listed(function, made):
        return [function(*made)]

    def differentiated(function, *inputs):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        out = function(*leaves)
        out = out[0] if isinstance(out, tuple) else out
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    calls = {
        **{product.name: partial(listed, product, product.make(9, 5, 30, 37, dtype)) for product in PRODUCTS},
        "linear_recurrence": lambda: differentiated(fastsparse.linear_recurrence, a, b),
        "pursuit": lambda: differentiated(lambda *t: fastsparse.matching_pursuit(*t, k=3), x, weight),
    }
    for cell in CELLS.values():
        u, weights, _ = cell.problem(2, 70, 3, dtype=dtype)
        for solver in ("sequential", "newton", "shooting"):
            calls[f"{cell.name}, {solver}"] = lambda u=u, w=weights, cell=cell, solver=solver: differentiated(
                lambda *t: cell.run(t[0], t[1:], solver=solver), u, *w
            )
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_sums_are_rounded_to_nearest(threads, name, dtype):
    threads(1)
    with running(name):
        for op, call in sums(dtype).items():
            ordinary = call()
            for mode in (mode for mode in FLOAT_MODES if "kept" in mode):
                with float_mode(mode):
                    found = call()
                    assert current_mode() == mode, "the caller's mode was not given back"
                assert same_bits(found, ordinary), (op, mode)


def test_all_threads_flush_or_none(threads):
    """Whatever the mode that they were made in."""
    values, indices, weight = torch.ones(20_000, 1), torch.zeros(20_000, 1).long(), torch.full((1, 64), 1e-40)
    threads(2)
    for mode in ("flushed nearest", ORDINARY) * 2:
        with float_mode(mode):
            out = fastsparse.spmm(values, indices, weight)
        bits = out.view(torch.int32)  # a comparison would be made in such threads too
        assert (bits != 0).all() if mode == ORDINARY else (bits == 0).all()


@modes
@pytest.mark.parametrize("name", ["reference", *PLAIN])
def test_subnormal_halves_are_not_those_of_fp32(name, mode):
    weight = (torch.arange(-1023, 1024) * 2.0**-24).half().expand(2, -1).contiguous()
    with running(name), float_mode(mode):
        out = fastsparse.spmm(torch.ones(2, 1).half(), torch.tensor([[0], [1]]), weight)
        values, _ = fastsparse.topk_encode(weight[:1, -1:], torch.ones(1, 1).half(), k=1)
    assert torch.equal(out, weight)
    assert values.item() == 1023 * 2.0**-24


@modes
@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
@pytest.mark.parametrize("name", PLAIN)
def test_solvers_agree(name, cell, mode):
    """Also where states die away into subnormal numbers."""
    u, weights, state = cell.problem(2, 200, 3)
    u[:, 40:150] = torch.tensor([30.0, 0, 0])[:, None] if cell.states == 1 else 0
    u[:, 150:] *= 1e-39
    state = tuple(part * 1e-36 for part in state)
    with running(name), float_mode(mode):
        outs = [cell.run(u, weights, state, solver=solver) for solver in ("sequential", "newton", "shooting")]
    for out in outs:
        assert_same_states(out, outs[0])
    assert_states(cell, outs[0], u, weights, state)
