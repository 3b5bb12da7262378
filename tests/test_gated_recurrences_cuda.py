"""The gated recurrences in CUDA C++ where their blocks, chunks and launches show."""

import pytest
import torch
from backends import GPU_BACKENDS, missing, running
from recurrences import CELLS, GRU, assert_states
from samples import WORK

import fastsparse

BACKENDS = [name for name, gpu in GPU_BACKENDS.items() if gpu.library is not None and not missing(name)]
cells = pytest.mark.parametrize("cell", CELLS.values(), ids=list(CELLS))
solvers = pytest.mark.parametrize("solver", ["sequential", "newton", "shooting"])


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch) -> str:
    for op in CELLS:  # the limit on work is that of Triton's interpreter
        monkeypatch.delitem(WORK, op)
    with running(request.param):
        yield request.param


@cells
@solvers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_steps_than_a_block_has_short_chunks_for(backend, cell, solver, dtype):
    """Chunks of more than the fewest steps, tile after tile, and blocks of fewer channels than a sector."""
    u, weights, state = cell.problem(1, 4200, 5, dtype=dtype)
    *outs, info = cell.run(u, weights, state, solver=solver, return_info=True)
    assert_states(cell, outs, u, weights, state)
    assert info.converged.all()


@cells
def test_auto_shoots_where_channels_are_few_and_steps_many(backend, cell):
    u, weights, state = cell.problem(2, 600, 3)
    cases = [((u, state), {}, True), ((u[:, :500], state), {}, False)]
    first = tuple(part[:1] for part in state)
    for bounds, shot in ([0, 600], True), ([0, 0, 600], False):
        here = tuple(part.repeat(len(bounds) - 1, 1) for part in first)
        cases.append(((u[:1], here), {"cu_seqlens": torch.tensor(bounds)}, shot))
    for (inputs, start), options, shot in cases:
        *outs, info = cell.run(inputs, weights, start, return_info=True, **options)
        assert_states(cell, outs, inputs, weights, start, **options)
        assert (info.passes != 0).any() == shot


@cells
@solvers
def test_what_a_channel_gets_is_its_own_affair(backend, cell, solver):
    """Neighbours in its block that never converge change no bit of it."""
    u, weights, state = cell.problem(2, 300, 11)
    clean = cell.run(u, weights, state, solver=solver, return_info=True)
    u[0, 40, :, 3] = torch.nan
    weights[0][:, 4] = 30
    u[:, :, :, 4] *= 8
    wild = cell.run(u, weights, state, solver=solver, return_info=True)
    others = [channel for channel in range(11) if channel not in (3, 4)]
    for out, part in zip(wild[:-1], clean[:-1], strict=True):
        assert torch.equal(out[..., others], part[..., others])
    assert torch.equal(wild[-1].passes[:, others], clean[-1].passes[:, others])
    assert wild[-1].converged[0, 3] == (solver == "sequential")
    assert_states(cell, wild[:-1], u, weights, state)


@cells
@pytest.mark.parametrize(("S", "H"), [(70, 1), (300, 3), (130, 33)])
def test_blocks_of_lines_of_several_sequences(backend, cell, S, H):
    """Of any lengths: each is what it is alone, to the last bit."""
    lengths = torch.arange(S) * 5 % 37
    bounds = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    u, weights, state = cell.problem(1, int(bounds[-1]), H, S=S)
    outs = cell.run(u, weights, state, solver="sequential", cu_seqlens=bounds)
    assert_states(cell, outs, u, weights, state, cu_seqlens=bounds)
    for s in range(S // 2, S // 2 + 5):
        steps = slice(int(bounds[s]), int(bounds[s + 1]))
        alone = tuple(part[s : s + 1] for part in state)
        found = cell.run(u[:, steps], weights, alone, solver="sequential")
        assert all(torch.equal(out[:, steps], part) for out, part in zip(outs, found, strict=True))


@cells
@solvers
def test_states_of_any_size(backend, cell, solver):
    """What gates remember of a start that is large, which nothing brings back to 1 soon."""
    u, weights, state = cell.problem(1, 200, 4, scale=0.1)
    u[:, :, 0] = 6 * (-1 if cell is GRU else 1)
    state[-1][0] = torch.tensor([1e2, -1e4, 1e8, 1e30])
    outs = cell.run(u, weights, state, solver=solver)
    assert_states(cell, outs, u, weights, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_precision_of_the_activations(backend, dtype):
    """Without a recurrence, and with one gate open, the other is what comes out: a tanh, then a sigmoid."""
    eps, x = torch.finfo(dtype).eps, torch.logspace(-40, 1.9, 20001, dtype=torch.float64).to(dtype)
    x = torch.cat((-x, x, torch.linspace(-1, 1, 20001, dtype=dtype)))
    weight, exact = torch.zeros(3, len(x), dtype=dtype), x.double()
    for gate, right in ((2, torch.tanh(exact)), (0, torch.sigmoid(exact))):
        u = torch.full((1, 1, 3, len(x)), torch.inf, dtype=dtype)
        u[0, 0, gate] = x
        found = fastsparse.gru_recurrence(u, weight)[0, 0].double()
        slack = 8 * eps * right.abs() * (1 if gate == 2 else 1 + exact.abs() / 8)
        assert ((found - right).abs() <= slack + torch.finfo(dtype).smallest_normal).all()
