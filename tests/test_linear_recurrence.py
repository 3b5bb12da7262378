"""linear_recurrence on every backend: channels and pairs, both directions, sequences of many lengths."""

import re

import pytest
import torch
from backends import host_backend_names, running
from hypothesis import given
from hypothesis import strategies as st
from oracle import DTYPES, assert_within, random
from recurrences import laid_out_apart, spans
from strategies import tensors

import fastsparse
from fastsparse.ops.linear_recurrence import linear_recurrence_backward
from fastsparse.reference.linear_recurrence import scan

BOUNDS = torch.tensor([0, 3, 3, 80, 81, 150, 150])  # of six sequences, two of them empty
forms = pytest.mark.parametrize("pairs", [False, True], ids=["channels", "pairs"])
directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def problem(B, T, H, *, pairs, S=None, dtype=torch.float32, decay=0.7):
    """a, b, h0; what a step amplifies is about ``decay``."""
    a = random(B, T, *(2, 2) * pairs, H, seed=1, dtype=dtype, scale=decay * (0.7 if pairs else 1))
    b = random(B, T, *(2,) * pairs, H, seed=2, dtype=dtype)
    return a, b, random(S or B, *(2,) * pairs, H, seed=3, dtype=dtype)


def assert_recurrence(h, a, b, h0=None, reverse=False, cu_seqlens=None):
    """h is the textbook's loop in fp64, to within what rounding in fp32 can do on the way."""
    exact, errors = textbook(a, b, h0, reverse, cu_seqlens)
    assert h.dtype == b.dtype
    assert h.is_contiguous()
    assert_within(h, exact, errors)


def textbook(a, b, h0=None, reverse=False, cu_seqlens=None):
    """The loop in fp64, and what the kernels' states may be off by."""
    T, unit = b.shape[1], rounding(b.dtype)
    most = torch.finfo(torch.float64 if b.dtype == torch.float64 else torch.float32).max
    a, b = a.double(), b.double()
    times = (lambda a, h: (a * h).sum(-2)) if a.dim() > b.dim() else lambda a, h: (a * h)[..., 0, :]
    exact, errors = torch.zeros_like(b), torch.zeros_like(b)
    for s, (row, steps) in enumerate(spans(b.shape[0], T, cu_seqlens)):
        now = torch.zeros_like(b[0, 0]) if T and h0 is None else (None if h0 is None else h0[s].double())
        error = None if now is None else torch.zeros_like(now)
        for t in reversed(range(T)[steps]) if reverse else range(T)[steps]:
            a_t = a[row, t] if a.dim() > b.dim() else a[row, t].unsqueeze(-2)
            first = h0 is None and t == (steps.stop - 1 if reverse else steps.start)
            a_t = torch.zeros_like(a_t) if first else a_t  # isn't read
            size = times(a_t.abs(), now.abs()) + b[row, t].abs()
            now = times(a_t, now) + b[row, t]
            error = times(a_t.abs(), error) + unit * size
            error = error.masked_fill(~(size + error < most), torch.inf)  # may have overflowed on the way
            exact[row, t], errors[row, t] = now, error
    return exact, errors.nan_to_num(torch.inf, torch.inf) + torch.finfo(torch.float32).tiny


def rounding(dtype):
    return 4 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def assert_gradient(found, a, h0, h, d_h, reverse=False, cu_seqlens=None):
    """The textbook's in fp64, to within what rounding can do: d_b is its loop in the other direction."""
    d_a, d_b, d_h0 = found
    pairs, unit, tiny = h.dim() == 4, rounding(h.dtype), torch.finfo(torch.float32).tiny
    back = a.transpose(2, 3) if pairs else a
    after = back.roll(1 if reverse else -1, 1)
    through, off = textbook(after, d_h, None, not reverse, cu_seqlens)
    assert_within(d_b, through, off)
    off = off + unit * through.abs()
    before, starts = torch.zeros_like(through), torch.zeros(2, *d_h0.shape, dtype=torch.float64)
    for s, (row, steps) in enumerate(spans(*h.shape[:2], cu_seqlens)):
        order = list(range(h.shape[1])[steps])[:: -1 if reverse else 1]
        before[row, order[1:]] = h[row, order[:-1]].double()
        if order and h0 is not None:
            first = order[0]
            before[row, first] = h0[s].double()
            for part, factor, of in ((0, back, through), (1, back.abs(), off)):
                terms = factor[row, first].double() * of[row, first]
                starts[part, s] = terms.sum(-2) if pairs else terms
    outer = (lambda x, y: x.unsqueeze(3) * y.unsqueeze(2)) if pairs else torch.mul
    off = outer(off, before.abs()).nan_to_num(torch.inf, torch.inf) + tiny
    assert_within(d_a, outer(through, before), off)
    assert_within(d_h0, starts[0], starts[1].nan_to_num(torch.inf, torch.inf) + tiny)
    assert all(part.dtype == h.dtype and part.is_contiguous() for part in found)


def gradient(a, h0, h, d_h, reverse=False, cu_seqlens=None):
    """d_a, d_b and d_h0, of states and gradients that need have nothing to do with each other."""
    return linear_recurrence_backward(a, h0, reverse, cu_seqlens, h, d_h, True, True, h0 is not None)


# (B, T, H), around the edges of vectors, chunks and blocks.
SHAPES = [(1, 1, 8), (3, 2, 65), (17, 31, 1), (2, 33, 9), (3, 64, 7), (2, 65, 16), (1, 129, 17), (2, 5, 33)]


@forms
@directions
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend, shape, reverse, pairs):
    a, b, h0 = problem(*shape, pairs=pairs)
    d_h = random(*b.shape, seed=4)
    for start in (None, h0):
        h = fastsparse.linear_recurrence(a, b, start, reverse=reverse)
        assert_recurrence(h, a, b, start, reverse)
        assert_gradient(gradient(a, start, h, d_h, reverse), a, start, h, d_h, reverse)


@forms
@directions
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_layouts(backend, dtype, reverse, pairs):
    a, b, h0 = problem(3, 40, 19, pairs=pairs, dtype=dtype)
    d_h = random(*b.shape, seed=4, dtype=dtype)
    h = fastsparse.linear_recurrence(a, b, h0, reverse=reverse)
    assert_recurrence(h, a, b, h0, reverse)
    right = gradient(a, h0, b, d_h, reverse)
    assert_gradient(right, a, h0, b, d_h, reverse)
    apart = [laid_out_apart(part) for part in (a, b, h0, d_h)]
    assert torch.equal(fastsparse.linear_recurrence(*apart[:3], reverse=reverse), h)
    found = gradient(apart[0], apart[2], apart[1], apart[3], reverse)
    assert all(torch.equal(*pair) for pair in zip(found, right, strict=True))
    one = [part[:1].expand_as(part) for part in (a, b, h0)]
    assert_recurrence(fastsparse.linear_recurrence(*one, reverse=reverse), *one, reverse)
    a, h, h0 = one
    for same in (d_h[:1, :1].expand_as(d_h), d_h[0, 0, ..., :1].expand_as(d_h)):  # as of h.sum()
        assert_gradient(gradient(a, h0, h, same, reverse), a, h0, h, same, reverse)


@forms
@directions
def test_sequences_of_many_lengths(backend, reverse, pairs):
    a, b, h0 = problem(1, 150, 4, pairs=pairs, S=6)
    d_h = random(*b.shape, seed=4)
    for start in (None, h0):
        for bounds in (BOUNDS, BOUNDS.int()):
            h = fastsparse.linear_recurrence(a, b, start, reverse=reverse, cu_seqlens=bounds)
            assert_recurrence(h, a, b, start, reverse, bounds)
        found = gradient(a, start, h, d_h, reverse, BOUNDS)
        assert_gradient(found, a, start, h, d_h, reverse, BOUNDS)
    assert not found[2][[1, 5]].any()  # of the empty ones
    none = torch.tensor([0, 0, 0])
    empty = fastsparse.linear_recurrence(a[:, :0], b[:, :0], h0[:2], reverse=reverse, cu_seqlens=none)
    assert empty.shape == b[:, :0].shape
    d_a, d_b, d_h0 = gradient(a[:, :0], h0[:2], empty, d_h[:, :0], reverse, none)
    assert d_a.shape == a[:, :0].shape
    assert d_b.shape == b[:, :0].shape
    assert torch.equal(d_h0, torch.zeros_like(h0[:2]))


def test_by_hand(backend):
    a, b = torch.tensor([2.0, 3, -1]).view(1, 3, 1), torch.tensor([1.0, 1, 4]).view(1, 3, 1)
    h0 = torch.tensor([[5.0]])
    assert fastsparse.linear_recurrence(a, b).flatten().tolist() == [1, 4, 0]
    assert fastsparse.linear_recurrence(a, b, h0).flatten().tolist() == [11, 34, -30]
    assert fastsparse.linear_recurrence(a, b, h0, reverse=True).flatten().tolist() == [-3 * 2 + 2 + 1, -2, -1]
    turn = torch.tensor([[0.0, -1], [1, 0]]).view(1, 1, 2, 2, 1).expand(1, 5, 2, 2, 1)
    h = fastsparse.linear_recurrence(turn, torch.zeros(1, 5, 2, 1), torch.tensor([[[1.0], [0.0]]]))
    assert h.flatten(2)[0].tolist() == [[0, 1], [-1, 0], [0, -1], [1, 0], [0, 1]]


def test_of_ones_it_is_a_cumulative_sum(backend):
    b = random(2, 2000, 3, seed=1, dtype=torch.float64)
    h = fastsparse.linear_recurrence(torch.ones_like(b), b)
    torch.testing.assert_close(h, b.cumsum(1))
    backwards = fastsparse.linear_recurrence(torch.ones_like(b), b, reverse=True)
    torch.testing.assert_close(backwards, b.flip(1).cumsum(1).flip(1))


@forms
@directions
def test_the_first_factor_is_not_read_without_a_state(backend, reverse, pairs):
    """And its gradient is 0, even of what is not finite."""
    a, b, _ = problem(1, 150, 4, pairs=pairs)
    d_h = random(*b.shape, seed=4)
    right = fastsparse.linear_recurrence(a, b, reverse=reverse, cu_seqlens=BOUNDS)
    back = gradient(a, None, b, d_h, reverse, BOUNDS)
    first = [2, 79, 80, 149] if reverse else [0, 3, 80, 81]
    a[:, first] = torch.nan
    assert torch.equal(fastsparse.linear_recurrence(a, b, reverse=reverse, cu_seqlens=BOUNDS), right)
    found = gradient(a, None, b, d_h, reverse, BOUNDS)
    assert all(torch.equal(*pair) for pair in zip(found, back, strict=True))
    d_h[:, first] = torch.nan
    d_a, d_b, _ = gradient(a, None, b, d_h, reverse, BOUNDS)
    assert not d_a[:, first].any()
    assert d_b[:, first].isnan().all()


@forms
@directions
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_channel(backend, bad, reverse, pairs):
    a, b, h0 = problem(3, 30, 5, pairs=pairs)
    d_h = random(*b.shape, seed=4)
    clean, d_clean = fastsparse.linear_recurrence(a, b, h0, reverse=reverse), gradient(a, h0, b, d_h, reverse)
    others = torch.ones_like(b, dtype=torch.bool)
    others[1, slice(0, 13) if reverse else slice(12, 30), ..., 3] = False
    for spoilt in (a, b):
        kept = spoilt.clone()
        spoilt[1, 12, ..., 3] = bad
        h = fastsparse.linear_recurrence(a, b, h0, reverse=reverse)
        assert torch.equal(h[others], clean[others])
        assert not h[1, 12, ..., 3].isfinite().any()
        spoilt.copy_(kept)
    d_h[1, 12, ..., 3] = bad
    found = gradient(a, h0, b, d_h, reverse)
    for mine, right in zip(found, d_clean, strict=True):
        others = torch.ones_like(mine, dtype=torch.bool)
        others[1, ..., 3] = False
        if mine.dim() > h0.dim():
            others[1, slice(0, 12) if reverse else slice(13, 30)] = True
        assert torch.equal(mine[others], right[others])
    assert not found[1][1, 12, ..., 3].isfinite().any()


@forms
@directions
def test_factors_whose_product_overflows(backend, reverse, pairs):
    """As no state does: zeros stay zeros, and what grows from little has a long way to infinity."""
    T = 40
    a = torch.full((2, T, *(2, 2) * pairs, 3), 32.0 if pairs else 64.0)
    b = torch.zeros(2, T, *(2,) * pairs, 3)
    h0 = torch.tensor([0.0, 1e-30, 1.0]).expand(2, *(2,) * pairs, 3)
    h = fastsparse.linear_recurrence(a, b, h0, reverse=reverse)
    grown = 64.0 ** torch.arange(1, T + 1, dtype=torch.float64)
    if reverse:
        grown = grown.flip(0)
    right = (grown.view(-1, *(1,) * (h.dim() - 2)) * h0[0].double()).float()
    torch.testing.assert_close(h, right.expand_as(h))


def factors_apart(T, distances, first, *, pairs, dtype=torch.float32):
    """a, b, h0: of the four factors that aren't 1 the middle two overflow, but not after the one before them.

    They stand from ``first`` on, each channel's at a distance of its own. All b are 0.
    """
    scale = 8 if dtype == torch.float64 else 1
    a = torch.ones(1, T, len(distances), dtype=dtype)
    for channel, distance in enumerate(distances):
        for i, exponent in enumerate((-30, 25, 25, -30)):
            a[0, first + i * distance, channel] = 10.0 ** (scale * exponent)
    b = torch.zeros_like(a)
    if pairs:
        turns = torch.where(a == 1, 0.0, 0.8)
        cos = torch.where(a == 1, 1.0, 0.6)
        a = a[:, :, None, None] * torch.stack((cos, -turns, turns, cos), 2).unflatten(2, (2, 2))
        b = torch.stack((b, b), 2)
    return a, b, torch.full_like(b[:, 0], 10.0 ** (scale * 10))


@forms
@directions
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_factors_whose_product_overflows_in_other_orders(backend, dtype, reverse, pairs):
    """Than the loop's: those that threads have between them, wherever these meet. And back from the end."""
    for distances in (range(1, 9), range(9, 17), range(17, 25)):
        for first in (0, 3):
            a, b, h0 = factors_apart(76, distances, first, pairs=pairs, dtype=dtype)
            if reverse:
                a = a.flip(1)
            h = fastsparse.linear_recurrence(a, b, h0, reverse=reverse)
            assert_recurrence(h, a, b, h0, reverse)
            assert not fastsparse.linear_recurrence(a, b, reverse=reverse).any()
        a, d_h, h0 = factors_apart(76, distances, 0, pairs=pairs, dtype=dtype)
        h = random(*d_h.shape, seed=4, dtype=dtype)
        assert not any(part.any() for part in gradient(a, h0, h, d_h, reverse))
        d_h[:, 0 if reverse else -1] = h0
        assert_gradient(gradient(a, h0, h, d_h, reverse), a, h0, h, d_h, reverse)


@forms
@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 5, 0)])
def test_nothing_to_do(backend, shape, pairs):
    leaves = [leaf.requires_grad_() for leaf in problem(*shape, pairs=pairs)]
    for reverse in (False, True):
        h = fastsparse.linear_recurrence(*leaves, reverse=reverse)
        assert h.shape == leaves[1].shape
        h.sum().backward()
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    assert all(torch.equal(grad, torch.zeros_like(leaf)) for grad, leaf in zip(grads, leaves, strict=True))


@forms
@directions
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(backend, reverse, packed, pairs):
    """The first exactly; the second too, since the gradient's own is made of both ops."""
    bounds = torch.tensor([0, 2, 2, 7]) if packed else None
    inputs = problem(1 if packed else 2, 7, 2, pairs=pairs, S=3 if packed else 2, dtype=torch.float64)

    def through(*leaves):
        return fastsparse.linear_recurrence(*leaves, reverse=reverse, cu_seqlens=bounds).sin()

    for some in (inputs, inputs[:2]):
        leaves = [leaf.requires_grad_() for leaf in some]
        assert torch.autograd.gradcheck(through, leaves)
        assert torch.autograd.gradgradcheck(through, leaves, fast_mode=True)


@given(data=st.data(), T=st.integers(1, 40), H=st.integers(1, 3), reverse=st.booleans())
def test_whatever_comes(backend, data, T, H, reverse):
    a, b = (data.draw(tensors((1, T, H), st.floats(-2, 2, width=32))) for _ in range(2))
    assert_recurrence(fastsparse.linear_recurrence(a, b, reverse=reverse), a, b, reverse=reverse)


@forms
@pytest.mark.parametrize("T", [1, 2, 3, 64, 100])
def test_the_parallel_scan_is_the_loop(T, pairs):
    """On which the reference's solvers stand."""
    a, b, _ = problem(2, T, 5, pairs=pairs, dtype=torch.float64)
    torch.testing.assert_close(scan(a, b), fastsparse.linear_recurrence(a, b))


def test_bad_arguments():
    a, b, h0 = problem(2, 4, 3, pairs=False)
    blocks, pairs, _ = problem(2, 4, 3, pairs=True)
    spans = torch.tensor([0, 5])
    wrong_types = [
        ((a.int(), b), {}, "a must be float32, bfloat16, float16 or float64, got int32"),
        ((a, b), {"reverse": 1}, "reverse must be a bool, got 1"),
    ]
    wrong_values = [
        ((a, b[0]), {}, "b must have shape (B, T, H), or for pairs (B, T, 2, H), got shape (4, 3)"),
        ((a[:, :3], b), {}, "a must have shape (B, T, H) = (2, 4, 3), got shape (2, 3, 3)"),
        ((blocks, b), {}, "a must have shape (B, T, H) = (2, 4, 3), got shape (2, 4, 2, 2, 3)"),
        ((a, pairs), {}, "a must have shape (B, T, 2, 2, H) = (2, 4, 2, 2, 3), got shape (2, 4, 3)"),
        ((blocks, blocks[:, :, 0, :1]), {}, "b must have shape (B, T, 2, H), got shape (2, 4, 1, 3)"),
        ((a, b, h0[:1]), {}, "h0 must have shape (B, H) = (2, 3), got shape (1, 3)"),
        ((blocks, pairs, h0), {}, "h0 must have shape (B, 2, H) = (2, 2, 3), got shape (2, 3)"),
        ((a, b, h0.double()), {}, "h0 must have the dtype of b (float32), got float64"),
        ((a, b), {"cu_seqlens": spans - 1}, "b must have B = 1 with cu_seqlens"),
        ((a[:1], b[:1]), {"cu_seqlens": spans}, "cu_seqlens must go from 0 to T = 4"),
    ]
    cases = [(TypeError, *case) for case in wrong_types] + [(ValueError, *case) for case in wrong_values]
    for error, arguments, options, message in cases:
        with pytest.raises(error, match=f"^linear_recurrence: {re.escape(message)}"):
            fastsparse.linear_recurrence(*arguments, **options)


def test_every_float16_is_widened_and_narrowed_as_pytorch_does():
    """On CPUs, where each level has its own way: NaN, infinities and subnormals, ties and overflow too."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    every, generator = bits.view(torch.float16), torch.Generator().manual_seed(0)
    factor, start = (every[torch.randperm(2**16, generator=generator)] for _ in range(2))
    # In fp32 their products are exact.
    expected = torch.addcmul(every.float(), factor.float(), start.float()).half()
    for name in host_backend_names():
        if name != "reference":
            with running(name):
                kept = fastsparse.linear_recurrence(every[None, None], every[None, None])
                found = fastsparse.linear_recurrence(factor[None, None], every[None, None], start[None])
            for result, right in ((kept[0, 0], every), (found[0, 0], expected)):
                same = result.view(torch.int16) == right.view(torch.int16)
                same |= result.isnan() & right.isnan()
                assert same.all(), f"{name}: {right[~same][:4]} came out as {result[~same][:4]}"
