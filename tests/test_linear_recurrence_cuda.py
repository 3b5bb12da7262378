"""linear_recurrence and the gated gradients in CUDA C++: where blocks, chunks and segments show."""

import pytest
import torch
from backends import GPU_BACKENDS, missing, running
from oracle import random
from recurrences import CELLS, GRU
from samples import WORK
from test_linear_recurrence import (
    assert_gradient,
    assert_recurrence,
    directions,
    factors_apart,
    forms,
    gradient,
    problem,
)

import fastsparse

BACKENDS = [name for name, gpu in GPU_BACKENDS.items() if gpu.library is not None and not missing(name)]
PACKED = torch.tensor([0, 7, 7, 1200, 1300])

# (B, T, H) that the emulated GPU, of four multiprocessors, takes with a thread a line, in chunks of two warps
# and of one, and in segments of time, of chunks of parts of warps. PACKED is of the last one's steps.
SHAPES = [(35, 19, 64), (8, 40, 64), (2, 130, 65), (1, 1500, 3), (1, 1300, 3)]
cells = pytest.mark.parametrize("cell", CELLS.values(), ids=list(CELLS))
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch) -> str:
    for op in ("linear_recurrence", *CELLS):
        for one in (op, f"{op}_backward"):
            monkeypatch.delitem(WORK, one)  # the limit on work is Triton's interpreter's
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
    assert_gradient(gradient(a, h0, h, b, reverse, bounds), a, h0, h, b, reverse, bounds)


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
@pytest.mark.parametrize("first", [0, 300])
def test_products_of_factors_may_overflow_between_segments(backend, pairs, first):
    a, b, h0 = factors_apart(1500, [40, 170, 390], first, pairs=pairs)
    assert_recurrence(fastsparse.linear_recurrence(a, b, h0), a, b, h0)
    assert not fastsparse.linear_recurrence(a, b).any()
    b[:, -1] = h0
    assert_gradient(gradient(a, h0, b, b), a, h0, b, b)


@forms
def test_what_is_not_finite_stays_in_its_segments(backend, pairs):
    a, b, h0 = problem(1, 1500, 3, pairs=pairs)
    clean = fastsparse.linear_recurrence(a, b, h0)
    d_clean = gradient(a, h0, clean, b)
    b[:, 700, ..., 1] = torch.nan
    h = fastsparse.linear_recurrence(a, b, h0)
    d_a, d_b, d_h0 = gradient(a, h0, clean, b)
    for mine, right in zip((d_a, d_b, d_h0), d_clean, strict=True):
        assert torch.equal(mine[..., ::2], right[..., ::2])
    assert torch.equal(d_b[:, 701:], d_clean[1][:, 701:])
    assert d_b[:, :701, ..., 1].isnan().all()
    assert torch.equal(h[..., ::2], clean[..., ::2])
    assert torch.equal(h[:, :700], clean[:, :700])
    assert h[:, 700:, ..., 1].isnan().all()


def gradients(cell, u, weights, state, upstream, dtype, **options):
    leaves = [part.detach().to(dtype).requires_grad_() for part in (u, *weights, *state)]
    split = 1 + len(weights)
    outs = cell.run(leaves[0], leaves[1:split], tuple(leaves[split:]), **options)
    return torch.autograd.grad(outs, leaves, [part.to(dtype) for part in upstream])


@cells
@shapes
def test_gradients(backend, cell, shape):
    bounds = PACKED if shape[1] == PACKED[-1] else None
    u, weights, state = cell.problem(*shape, S=None if bounds is None else 4)
    upstream = [random(*shape, seed=30 + i) for i in range(cell.states)]
    found = gradients(cell, u, weights, state, upstream, torch.float32, cu_seqlens=bounds)
    with fastsparse.use_backend("reference"):
        right = gradients(cell, u, weights, state, upstream, torch.float64, cu_seqlens=bounds)
    for mine, theirs in zip(found, right, strict=True):
        atol = 64 * torch.finfo(torch.float32).eps * theirs.abs().max().item()
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=atol)


@cells
@pytest.mark.parametrize("distances", [range(2, 10), range(10, 18), (40, 170, 390)], ids=str)
@pytest.mark.parametrize("first", [0, 3])
def test_gradients_whose_factors_overflow_in_other_orders(backend, cell, distances, first):
    """The weight of a tanh, 1e20, is in the derivative, next to gates that are saturated."""
    T = 3 * max(distances) + 5
    u, weights, state = cell.problem(1, T, len(distances))
    for part in (*weights, *state):
        part.zero_()  # and so all states are
    weights[0][2] = 1e20
    u[:, :, 0], u[:, :, 1], u[:, :, 2] = -200 if cell is GRU else 200, 200, 0
    for channel, distance in enumerate(distances):
        for i, pre in enumerate((-80, 200, 200, -80)):  # a derivative of 2e-15, or of 1e20
            t = first + i * distance
            if cell is GRU:
                u[0, t, :2, channel] = torch.tensor([200.0, pre])
            else:  # from c to h, and back
                u[0, t + 1, 0, channel] = -200
                u[0, t, 1, channel] = pre
    upstream = [torch.zeros(1, T, len(distances)) for _ in range(cell.states)]
    upstream[-1][:, -1] = 1e-10  # so that no gradient overflows
    found = gradients(cell, u, weights, state, upstream, torch.float32)
    with fastsparse.use_backend("reference"):
        right = gradients(cell, u, weights, state, upstream, torch.float64)
    assert right[0].abs().max() > 1e10
    for mine, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-37)
