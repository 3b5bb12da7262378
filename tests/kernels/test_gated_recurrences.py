"""What the gated recurrences in Triton promise beyond the op tests, however their kernels are laid out."""

import pytest
import torch
from backends import missing, running
from recurrences import CELLS, GRU, assert_same_states
from triton_interpreter import interpreting

pytest.importorskip("triton")

import triton
import triton.language as tl
from fastsparse.kernels import _recurrence
from fastsparse.kernels._cells import sigmoid, tanh

from fastsparse._options import SOLVERS

BACKEND = "triton-gpu" if torch.cuda.is_available() else "triton-interpreted"
cells = pytest.mark.parametrize("cell", CELLS.values(), ids=list(CELLS))


@pytest.fixture(autouse=True)
def _in_triton():
    if (reason := missing(BACKEND)) is not None:
        pytest.skip(reason)
    with running(BACKEND):
        yield


def lay_out(monkeypatch, solver: str, **layout: int) -> None:
    name = solver.upper()
    monkeypatch.setattr(_recurrence, name, getattr(_recurrence, name) | layout)


@cells
@pytest.mark.parametrize(
    ("solver", "layout"),
    [
        ("newton", {"STEPS": 16}),
        ("newton", {"STEPS": 128}),
        ("shooting", {"CHUNKS": 4, "STEPS": 3}),
        ("shooting", {"CHUNKS": 64, "STEPS": 1}),
    ],
    ids=str,
)
def test_tiles_and_chunks_change_nothing(monkeypatch, cell, solver, layout):
    u, weights, state = cell.problem(1, 71, 5, S=4)
    bounds = torch.tensor([0, 40, 40, 43, 71])
    loop = cell.run(u, weights, state, cu_seqlens=bounds, solver="sequential")
    lay_out(monkeypatch, solver, **layout)
    *outs, info = cell.run(u, weights, state, cu_seqlens=bounds, solver=solver, return_info=True)
    assert_same_states(outs, loop)
    assert info.converged.all()


@cells
@pytest.mark.parametrize(
    ("solver", "layout"),
    [("newton", {"STEPS": 16, "PASSES": 5}), ("shooting", {"CHUNKS": 8, "STEPS": 3, "PASSES": 5})],
)
def test_what_a_solver_gives_up_is_the_loops_bit_by_bit(monkeypatch, cell, solver, layout):
    """Where one tile of a channel fails, all of it; what didn't fail is as near as a certificate says."""
    u, weights, state = cell.problem(3, 60, 6, scale=2)
    loop = cell.run(u, weights, state, solver="sequential")
    lay_out(monkeypatch, solver, **layout)
    *outs, info = cell.run(u, weights, state, solver=solver, return_info=True)
    failed = ~info.converged
    assert failed.any()
    assert not failed.all()
    assert (info.passes[failed] == -1).all()
    assert (info.passes[~failed] <= layout["PASSES"]).all()
    assert all(torch.equal(*(part.mT[failed] for part in pair)) for pair in zip(outs, loop, strict=True))
    certain = [[part.mT[~failed] for part in states] for states in (outs, loop)]
    assert_same_states(*certain)


def test_auto_is_a_solver_by_size():
    fewest = 132 * 64
    assert _recurrence.fastest(fewest - 1, 2048, 132) == "shooting"
    assert _recurrence.fastest(fewest, 2048, 132) == "sequential"
    assert _recurrence.fastest(1, 64, 132) == "sequential"
    u, weights, state = GRU.problem(1, 200, 3)
    *_, info = GRU.run(u, weights, state, return_info=True)
    assert (info.passes > 0).all()
    *_, info = GRU.run(u[:, :20], weights, state, return_info=True)
    assert (info.passes == 0).all()


def test_an_unknown_solver_is_refused():
    u, (weight,), _ = GRU.problem(1, 3, 2)
    with pytest.raises(ValueError, match=r"^gru_recurrence: solver must be in \[0, 4\), got 4"):
        torch.ops.fastsparse.gru_recurrence.default(u, weight, None, None, len(SOLVERS))


@triton.jit
def _activate(x, s, t, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < size)
    tl.store(s + at, sigmoid(value), mask=at < size)
    tl.store(t + at, tanh(value), mask=at < size)


def test_activations():
    """To a few units in the last place, wherever they aren't beneath all that a state can notice.

    Of a sigmoid |x| more, which a GPU may lose to a rounded argument of 2^x.
    """
    sizes = torch.cat((torch.logspace(-38, 2, 20_000), torch.linspace(0.4, 0.6, 20_000)))
    x = torch.cat((sizes, -sizes, torch.tensor([0.0, torch.inf, -torch.inf, torch.nan])))
    device = "cuda" if BACKEND == "triton-gpu" else "cpu"
    x = x.to(device)
    s, t = torch.empty_like(x), torch.empty_like(x)
    with interpreting():
        _activate[(triton.cdiv(len(x), 8192),)](x, s, t, len(x), BLOCK=8192)
    eps = torch.finfo(torch.float32).eps
    wide, size = x.double(), x.double().abs().clamp(max=100)
    for found, exact, units in ((s, wide.sigmoid(), 4 + size), (t, wide.tanh(), 4)):
        near = (found.double() - exact).abs() <= units * eps * exact.abs() + 1e-37
        assert (near | (found.isnan() & exact.isnan())).all()
