"""linear_recurrence and the gated gradients in CUDA C++: where blocks, chunks and segments show."""

import pytest
import torch
from backends import GPU_BACKENDS, OPS, Op, missing, running
from oracle import random
from recurrences import CELLS
from test_linear_recurrence import assert_recurrence, directions, forms, problem

import fastsparse

BACKENDS = [name for name, gpu in GPU_BACKENDS.items() if gpu.library is not None and not missing(name)]
PACKED = torch.tensor([0, 7, 7, 1200, 1300])

# (B, T, H) that the emulated GPU, of four multiprocessors, takes with a thread a line, in chunks of two warps
# and of one, and in segments of time, of chunks of parts of warps. PACKED is of the last one's steps.
SHAPES = [(35, 19, 64), (8, 40, 64), (2, 130, 65), (1, 1500, 3), (1, 1300, 3)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch) -> str:
    for op in ("linear_recurrence", *CELLS, *(f"{cell}_backward" for cell in CELLS)):
        monkeypatch.setitem(OPS, op, Op(lambda *_: 0))  # the limit on work is that of Triton's interpreter
    with running(request.param):
        yield request.param


@forms
@directions
@shapes
def test_layouts_of_time(backend, shape, reverse, pairs):
    bounds = PACKED if shape[1] == PACKED[-1] else None
    a, b, h0 = problem(*shape, pairs=pairs, S=None if bounds is None else 4)
    h = fastsparse.linear_recurrence(a, b, h0, reverse=reverse, cu_seqlens=bounds)
    assert_recurrence(h, a, b, h0, reverse, bounds)


@forms
@pytest.mark.parametrize("T", [100, 1500])
def test_products_of_factors_may_overflow(backend, pairs, T):
    """Where no state does: zeros stay zeros, though chunks and segments join infinities."""
    a, b, _ = problem(1, T, 3, pairs=pairs)
    a[:, : T - 20] = 1e10
    b[:, : T - 20] = 0
    a[..., 1] = 0.5  # a channel beside them that is as ever
    h = fastsparse.linear_recurrence(a, b)
    assert_recurrence(h, a, b)
    assert not h[:, : T - 20].any()
    alone = fastsparse.linear_recurrence(a[..., 1:2].contiguous(), b[..., 1:2].contiguous())
    assert torch.equal(h[..., 1:2], alone)


@forms
def test_what_is_not_finite_stays_in_its_segments(backend, pairs):
    a, b, h0 = problem(1, 1500, 3, pairs=pairs)
    clean = fastsparse.linear_recurrence(a, b, h0)
    b[:, 700, ..., 1] = torch.nan
    h = fastsparse.linear_recurrence(a, b, h0)
    assert torch.equal(h[..., ::2], clean[..., ::2])
    assert torch.equal(h[:, :700], clean[:, :700])
    assert h[:, 700:, ..., 1].isnan().all()


@pytest.mark.parametrize("cell", CELLS.values(), ids=list(CELLS))
@shapes
def test_gradients(backend, cell, shape):
    bounds = PACKED if shape[1] == PACKED[-1] else None
    u, weights, state = cell.problem(*shape, S=None if bounds is None else 4)
    upstream = [random(*shape, seed=30 + i) for i in range(cell.states)]

    def gradients(dtype):
        leaves = [part.detach().to(dtype).requires_grad_() for part in (u, *weights, *state)]
        split = 1 + len(weights)
        outs = cell.run(leaves[0], leaves[1:split], tuple(leaves[split:]), cu_seqlens=bounds)
        return torch.autograd.grad(outs, leaves, [part.to(dtype) for part in upstream])

    found = gradients(torch.float32)
    with fastsparse.use_backend("reference"):
        right = gradients(torch.float64)
    for mine, theirs in zip(found, right, strict=True):
        atol = 64 * torch.finfo(torch.float32).eps * theirs.abs().max().item()
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=atol)
