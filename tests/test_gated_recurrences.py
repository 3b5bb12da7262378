"""The gated recurrences on every backend, by every solver: the sequential answer, certified."""

import re
from pathlib import Path

import pytest
import torch
from backends import host_backend_names, running
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, random
from recurrences import (
    CELLS,
    GRU,
    assert_follows,
    assert_same_states,
    assert_states,
    laid_out_apart,
    spread,
    textbook,
)
from strategies import tensors

import fastsparse
from fastsparse._options import ACTIVATIONS, METHODS, MOST_SPREAD, NEWTON_PASSES, SHOOTING_PASSES, SMALL
from fastsparse._options import SOLVERS as ALL_SOLVERS
from fastsparse.reference import _solvers

SOLVERS = ALL_SOLVERS[1:]
PARALLEL = SOLVERS[1:]
LEVELS = [name for name in host_backend_names() if name.startswith("cpu-")]
BOUNDS = torch.tensor([0, 3, 3, 80, 81, 150, 150])  # of six sequences, two of them empty
cells = pytest.mark.parametrize("cell", CELLS.values(), ids=list(CELLS))
solvers = pytest.mark.parametrize("solver", SOLVERS)
parallel = pytest.mark.parametrize("solver", PARALLEL)

# (B, T, H), around the edges of vectors, chunks and blocks.
SHAPES = [
    ((1, 1, 8), torch.float32),
    ((3, 2, 33), torch.float16),
    ((17, 31, 1), torch.bfloat16),
    ((2, 33, 9), torch.float64),
    ((3, 64, 7), torch.float32),
    ((2, 65, 16), torch.bfloat16),
    ((1, 129, 17), torch.float32),
    ((2, 200, 65), torch.float32),
]


@cells
@solvers
@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
def test_shapes_and_dtypes(backend, cell, solver, shape, dtype):
    u, weights, state = cell.problem(*shape, dtype=dtype)
    for start in (None, state):
        *outs, info = cell.run(u, weights, start, solver=solver, return_info=True)
        assert_states(cell, outs, u, weights, start)
        assert info.converged.all()
        assert info.passes.shape == info.converged.shape == shape[::2]
        assert info.passes.dtype == torch.int32
        assert (info.passes > 0).all() == (solver != "sequential")


@cells
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_layouts(backend, cell, dtype):
    u, weights, state = cell.problem(3, 12, 9, dtype=dtype)
    apart = [tuple(laid_out_apart(part) for part in parts) for parts in ((u,), weights, state)]
    assert_states(cell, cell.run(*apart[0], *apart[1:]), u, weights, state)
    one = u[:1].expand(3, -1, -1, -1)
    assert_states(cell, cell.run(one, weights, state), one, weights, state)


@cells
@solvers
def test_sequences_of_many_lengths(backend, cell, solver):
    u, weights, state = cell.problem(1, 150, 4, S=6)
    for start in (None, state):
        for bounds in (BOUNDS, BOUNDS.int()):
            outs = cell.run(u, weights, start, cu_seqlens=bounds, solver=solver)
            assert_states(cell, outs, u, weights, start, bounds)
    whole = torch.tensor([0, 150])
    outs = cell.run(u, weights, cu_seqlens=whole, solver=solver)
    assert_same_states(outs, cell.run(u, weights, solver=solver))


@cells
@solvers
def test_sequences_may_have_no_step(backend, cell, solver):
    u, weights, state = cell.problem(2, 0, 4)
    for bounds, start in ([0, 0, 0], state), ([0], None):
        outs = cell.run(u[:1], weights, start, cu_seqlens=torch.tensor(bounds), solver=solver)
        assert all(out.shape == (1, 0, 4) for out in outs)


@cells
def test_a_sequence_can_be_gone_on_with(backend, cell):
    u, weights, state = cell.problem(3, 40, 5)
    whole = cell.run(u, weights, state)
    head = cell.run(u[:, :17], weights, state)
    tail = cell.run(u[:, 17:], weights, tuple(part[:, -1] for part in head))
    assert all(torch.equal(torch.cat(pair, 1), part) for *pair, part in zip(head, tail, whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", LEVELS)
def test_the_error_of_sigmoid_and_tanh(backend, dtype):
    """A GRU's first state is z n: sigmoid where n is 1, tanh where z is. To 4 ulp, where 2.9 were seen."""
    infinity = torch.tensor(torch.inf, dtype=dtype)
    far = 89 if dtype == torch.float32 else 709  # sigmoid of less isn't a normal number
    near = torch.linspace(-far, far, 1 << 17, dtype=dtype)
    powers = torch.logspace(-37, 1, 1 << 15, dtype=dtype)
    special = torch.tensor([0, torch.inf, -torch.inf, torch.nan, -1e30, 1e30], dtype=dtype)
    x = torch.cat((near, near / 9, near / 99, powers, -powers, special))
    u = torch.zeros(2, 1, 3, len(x), dtype=dtype)
    u[0, 0, 0], u[0, 0, 2] = x, infinity
    u[1, 0, 0], u[1, 0, 2] = infinity, x
    with running(backend):
        h = fastsparse.gru_recurrence(u, torch.zeros(3, len(x), dtype=dtype))[:, 0]
    exact = torch.stack((torch.sigmoid(x.double()), torch.tanh(x.double())))
    info = torch.finfo(dtype)
    binade = torch.exp2(torch.frexp(exact.abs().clamp_min(info.tiny)).exponent.double() - 1)
    ulp = (binade * info.eps).nan_to_num()
    error = (h.double() - exact).abs()
    assert (error.nan_to_num() <= 4 * ulp + 2 * info.tiny).all()
    assert torch.equal(h.isnan(), exact.isnan())
    assert h[:, -6:-3].tolist() == [[0.5, 1, 0], [0, 1, -1]]
    assert (h.nan_to_num().abs() <= 1).all()


def test_it_is_pytorchs_gru_of_diagonal_matrices():
    """Whose update gate is the other way round, and who counts reset, update, candidate."""
    (u, (weight,), (h0,)), H = GRU.problem(3, 30, 6, dtype=torch.float64), 6
    theirs = torch.nn.GRU(3 * H, H, batch_first=True, dtype=torch.float64)
    zero = torch.zeros(H, H, dtype=torch.float64)
    z, r, n = weight
    with torch.no_grad():
        theirs.weight_hh_l0.copy_(torch.cat((r.diag(), -z.diag(), n.diag())))
        eye = torch.eye(H, dtype=torch.float64)
        rows = (zero, eye, zero), (-eye, zero, zero), (zero, zero, eye)
        theirs.weight_ih_l0.copy_(torch.cat([torch.cat(row, dim=1) for row in rows]))
        theirs.bias_ih_l0.zero_()
        theirs.bias_hh_l0.zero_()
        right, _ = theirs(u.flatten(2), h0[None])
    torch.testing.assert_close(fastsparse.gru_recurrence(u, weight, h0), right)


# The contract: every solver's answer is the sequential one.


@cells
@parallel
@pytest.mark.parametrize("scale", [0.03, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_recurrent_weights_of_every_scale(backend, cell, solver, scale, dtype):
    """From those of which three iterations of Newton's method are enough, to chaos, where nothing helps."""
    u, weights, state = cell.problem(2, 640, 16, scale=scale, dtype=dtype)
    *outs, info = cell.run(u, weights, state, solver=solver, return_info=True)
    assert_states(cell, outs, u, weights, state)
    assert_follows(cell, outs, u, weights, state)
    failed = ~info.converged
    if scale == 0.03:
        assert not failed.any()
    if scale == 4 and solver == "newton":
        assert failed.any()
        assert not failed.all()
    if failed.any():
        loop = cell.run(u, weights, state, solver="sequential")
        assert all(torch.equal(*(part.mT[failed] for part in pair)) for pair in zip(outs, loop, strict=True))
        assert (info.passes[failed] == -1).all()


@cells
@pytest.mark.parametrize("solver", ["auto", *PARALLEL])
def test_many_chunks(backend, cell, solver):
    u, weights, state = cell.problem(1, 4200, 1)
    *outs, info = cell.run(u, weights, state, solver=solver, return_info=True)
    assert_states(cell, outs, u, weights, state)
    assert info.converged.all()
    if solver in PARALLEL or backend.startswith("cpu-"):
        assert (info.passes > 0).all()


@cells
@parallel
@pytest.mark.parametrize("scale", [4, 20])
def test_what_is_certified_is_what_steps_make(backend, cell, solver, scale):
    """In chaos too, where states that are rounded in two ways part: no channel where they might is certified.

    Few do, of those where errors spread: the bound is what is tested, on states of the loop.
    """
    u, weights, state = cell.problem(2, 320, 48, scale=scale)
    *outs, info = cell.run(u, weights, state, solver=solver, return_info=True)
    loop = cell.run(u, weights, state, solver="sequential")
    sure, variance = info.converged, spread(cell, loop, u, weights, state)
    assert sure.any()
    assert not sure.all()
    assert torch.equal(info.passes > 0, sure)
    assert (info.passes[~sure] == -1).all()
    assert variance[sure].max() < 1.1 * MOST_SPREAD
    if solver == "shooting" and scale == 4:
        assert sure[variance < MOST_SPREAD / 8].float().mean() > 0.95
    for out, other in zip(outs, loop, strict=True):
        off = (out - other).abs().amax(1)
        assert not off[~sure].any(), "the loop steps in"
        assert off[sure].max() <= 64 * torch.finfo(torch.float32).eps


def test_channels_in_which_a_chunk_stretches_what_it_squeezed(backend):
    """Rounding errors made inside of chunks: shooting once certified states that were off by up to 1.5."""
    found = {102: 480, 104: 491, 107: 234, 113: 81, 131: 271}  # among some 60,000, by seed
    u = torch.stack([random(1, 512, 3, 512, seed=seed)[..., channel] for seed, channel in found.items()], -1)
    weight = [random(3, 512, seed=seed + 1000, scale=20)[:, channel] for seed, channel in found.items()]
    h, info = fastsparse.gru_recurrence(u, torch.stack(weight, -1), solver="shooting", return_info=True)
    loop = fastsparse.gru_recurrence(u, torch.stack(weight, -1), solver="sequential")
    torch.testing.assert_close(h, loop, rtol=0, atol=64 * torch.finfo(torch.float32).eps)
    assert not info.converged.any()


@cells
@solvers
@pytest.mark.parametrize(
    ("dtype", "first", "T"), [(torch.float32, 1e-25, 300), (torch.float64, 1e-200, 700)], ids=str
)
def test_what_begins_next_to_nothing_may_grow(backend, cell, solver, dtype, first, T):
    """Nothing would stay nothing here, but all else goes away from it."""
    u, weights, state = cell.problem(1, T, 1, dtype=dtype)
    for part in (u, *weights):
        part.zero_()
    for part in state:
        part.fill_(first)
    weights[0][2] = 8
    outs = cell.run(u, weights, state, solver=solver)
    assert_same_states(outs, cell.run(u, weights, state, solver="sequential"))
    assert (outs[0][:, -1] > 0.1).all()


@cells
@parallel
def test_where_a_reference_solver_gives_up_the_loop_steps_in(monkeypatch, cell, solver):
    u, weights, state = cell.problem(2, 200, 5, scale=2)
    monkeypatch.setattr(_solvers, "CHUNK", 16)
    monkeypatch.setattr(_solvers, f"{solver.upper()}_PASSES", 2)
    with fastsparse.use_backend("reference"):
        loop = cell.run(u, weights, state, solver="sequential")
        *outs, info = cell.run(u, weights, state, solver=solver, return_info=True)
    failed = ~info.converged
    assert failed.any()
    assert all(torch.equal(*(part.mT[failed] for part in pair)) for pair in zip(outs, loop, strict=True))


@cells
@solvers
def test_slow_gates(backend, cell, solver):
    """Channels that forget one part in thirty, or in a thousand, at each step: errors pile up."""
    u, weights, state = cell.problem(2, 1000, 6, scale=0.3)
    u[:, :, 0] = 3.5 * torch.tensor([1.0, 1, 1, 2, 2, 2]) * (-1 if cell is GRU else 1)
    *outs, info = cell.run(u, weights, state, solver=solver, return_info=True)
    assert_states(cell, outs, u, weights, state)
    assert_same_states(outs, cell.run(u, weights, state, solver="sequential"))
    assert solver == "newton" or info.converged.all()


@cells
@solvers
@pytest.mark.parametrize(("gate", "weight"), [(2.0, 8), (20.0, 16)])
def test_a_switch_remembers_its_first_input(backend, cell, solver, gate, weight):
    """Two stable states: which one depends on the first input, through all steps that follow.

    These pull the other way, too weakly to turn a state that is there, but not one that is guessed: chunks
    end far from where the next one starts, which forgets it, in the second case at once: no derivative tells.
    """
    T = 300
    u, weights = torch.zeros(2, T, 3, 1), tuple(torch.zeros(rows, 1) for rows in cell.weights)
    u[0, :, 2], u[1, :, 2] = -0.02, 0.02
    u[0, 0, 2], u[1, 0, 2] = 0.5, -0.5
    u[:, :, 0] = u[:, :, 1] = gate
    u[:, :, 0] *= 1 if cell is GRU else -1
    weights[0][2] = weight
    (h, *_), info = (out := cell.run(u, weights, solver=solver, return_info=True))[:-1], out[-1]
    assert_states(cell, out[:-1], u, weights)
    assert h[0, -1] > 0.5
    assert h[1, -1] < -0.5
    assert info.passes.shape == (2, 1)


@cells
@solvers
@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 5, 0)])
def test_nothing_to_do(backend, cell, solver, shape):
    u, weights, state = cell.problem(*shape)
    leaves = [leaf.requires_grad_() for leaf in (u, *weights, *state)]
    *outs, info = cell.run(u, weights, state, solver=solver, return_info=True)
    assert all(out.shape == shape for out in outs)
    assert info.passes.shape == (shape[0], shape[2])
    assert info.converged.all()
    sum(out.sum() for out in outs).backward()
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    assert all(torch.equal(grad, torch.zeros_like(leaf)) for grad, leaf in zip(grads, leaves, strict=True))


@cells
@solvers
@pytest.mark.parametrize(("T", "gate", "bad"), [(130, 0, torch.nan), (130, 2, torch.inf), (40, 2, torch.nan)])
def test_what_is_not_finite_stays_in_its_channel(backend, cell, solver, T, gate, bad):
    """It changes no bit of others or of other sequences, nor of what comes before more than solvers may."""
    u, weights, state = cell.problem(3, T, 6)
    *clean, before = cell.run(u, weights, state, solver=solver, return_info=True)
    u[1, T // 2, gate, 3] = bad
    *outs, info = cell.run(u, weights, state, solver=solver, return_info=True)
    others = torch.ones(3, 6, dtype=torch.bool)
    others[1, 3] = False
    assert torch.equal(info.passes[others], before.passes[others])
    for out, part in zip(outs, clean, strict=True):
        assert torch.equal(out.mT[others], part.mT[others])
        torch.testing.assert_close(out[1, : T // 2, 3], part[1, : T // 2, 3], rtol=0, atol=1e-5)
    assert_same_states(outs, cell.run(u, weights, state, solver="sequential"))
    if bad != bad:
        assert outs[0][1, T // 2 :, 3].isnan().all()
        assert info.passes[1, 3] == (0 if solver == "sequential" else -1)


@cells
@solvers
@pytest.mark.parametrize("level", LEVELS)
def test_a_slice_of_channels_is_that_of_the_whole(cell, level, solver):
    """Bit by bit on CPUs, of every level, whose vectors hold other channels then, or end elsewhere."""
    for T, H in (40, 37), (200, 70), (2100, 3):
        u, weights, state = cell.problem(2, T, H)
        for part in slice(1, 2), slice(1, H - 1), slice(H // 2, H):
            alone = [rows[:, part] for rows in weights], [start[:, part] for start in state]
            with running(level):
                whole = cell.run(u, weights, state, solver=solver, return_info=True)
                found = cell.run(u[..., part], *alone, solver=solver, return_info=True)
            for mine, right in zip(
                (*found[:-1], found[-1].passes), (*whole[:-1], whole[-1].passes), strict=True
            ):
                assert torch.equal(mine, right[..., part])


@cells
@solvers
def test_nan_of_weights_and_states(backend, cell, solver):
    u, weights, state = cell.problem(3, 90, 5)
    clean = cell.run(u, weights, state, solver=solver)
    for where in range(len(weights) + len(state)):
        parts = [part.clone() for part in (*weights, *state)]
        parts[where][-1, 2] = torch.nan
        outs = cell.run(u, parts[: len(weights)], tuple(parts[len(weights) :]), solver=solver)
        spoilt = outs[0].isnan().nonzero()
        assert (spoilt[:, 2] == 2).all()
        assert set(spoilt[:, 0].tolist()) == ({0, 1, 2} if where < len(weights) else {2})
        kept = torch.arange(5) != 2
        for out, part in zip(outs, clean, strict=True):
            torch.testing.assert_close(out[..., kept], part[..., kept], rtol=0, atol=1e-5)


@cells
@parallel
@settings(max_examples=10)
@given(data=st.data(), T=st.integers(1, 66), H=st.integers(1, 2))
def test_solvers_agree_on_whatever_comes(backend, cell, solver, data, T, H):
    small = st.floats(-1, 1, width=32) | st.sampled_from([torch.nan, torch.inf, 0.0, 1e-30])
    u = data.draw(tensors((1, T, 3, H)))
    weights = tuple(data.draw(tensors((rows, H), small)) for rows in cell.weights)
    state = tuple(data.draw(tensors((1, H))) for _ in range(cell.states))
    outs = cell.run(u, weights, state, solver=solver)
    assert_same_states(outs, cell.run(u, weights, state, solver="sequential"))


# Gradients.


@cells
@solvers
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(backend, cell, solver, packed):
    shape, bounds = ((1, 9, 2), torch.tensor([0, 2, 2, 9])) if packed else ((2, 5, 2), None)
    u, weights, state = cell.problem(*shape, S=3 if packed else 2, dtype=torch.float64)

    def through(u, *others):
        weights, state = others[: len(cell.weights)], others[len(cell.weights) :]
        outs = cell.run(u, weights, state or None, cu_seqlens=bounds, solver=solver)
        return tuple(out.sin() for out in outs)

    for inputs in ((u, *weights, *state), (u, *weights)):
        leaves = [leaf.requires_grad_() for leaf in inputs]
        assert torch.autograd.gradcheck(through, leaves, fast_mode=solver != "sequential")


@cells
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_pytorchs_of_the_textbook(backend, cell, dtype, packed):
    """To fp32's precision, or, since states are rounded where they are kept, to that of halves."""
    bounds = BOUNDS if packed else None
    u, weights, state = cell.problem(1 if packed else 3, 150, 7, S=6 if packed else 3, dtype=dtype)
    upstream = [random(*u.shape[:2], 7, seed=30 + i, dtype=dtype) for i in range(cell.states)]
    leaves = [leaf.requires_grad_() for leaf in (u, *weights, *state)]
    outs = cell.run(u, weights, state, cu_seqlens=bounds)
    found = torch.autograd.grad(outs, leaves, upstream)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    split = 1 + len(weights)
    exact = textbook(cell, wide[0], wide[1:split], tuple(wide[split:]), bounds)
    right = torch.autograd.grad(exact, wide, [part.double() for part in upstream])
    for mine, theirs, leaf in zip(found, right, leaves, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == leaf.shape
        eps = torch.finfo(dtype).eps
        tolerance = {
            "rtol": 8 * eps,
            "atol": (8 if dtype.itemsize == 2 else 64) * eps * theirs.abs().max().item(),
        }
        torch.testing.assert_close(mine.double(), theirs, **tolerance)


@cells
@pytest.mark.parametrize("on_the_way", [False, True])
def test_derivatives_whose_product_overflows(backend, cell, on_the_way):
    """Where nothing comes from the steps that they'd amplify, gradients are finite.

    Between gates that are shut no gradient is large, nor is any at the end, by which one could tell.
    """
    u, weights = torch.zeros(2, 40, 3, 3), [torch.zeros(rows, 3) for rows in cell.weights]
    # A state of zeros stays, and is left in strides of some 25, or of 1000.
    weights[0][2] = torch.tensor([4000.0, 0, 0]) if on_the_way else 100
    for shut in (slice(0, 8), slice(24, 32)) if on_the_way else ():
        u[:, shut, 0], u[:, shut, 1] = 200 if cell is GRU else -200, -200
    leaves = [leaf.requires_grad_() for leaf in (u, *weights)]
    out = cell.run(u, tuple(weights))[0]
    upstream = torch.zeros_like(out)
    upstream[0, [9, 28] if on_the_way else 3] = upstream[1, 0, 1] = 1
    found = torch.autograd.grad(out, leaves, upstream)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = textbook(cell, wide[0], tuple(wide[1:]))[0]
    right = torch.autograd.grad(exact, wide, upstream.double(), materialize_grads=True)
    assert right[0].any()
    for mine, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


# What is said twice.


def test_python_and_cpp_say_the_same_of_solvers():
    csrc = Path(__file__).parents[1] / "csrc"
    if not csrc.exists():
        pytest.skip("this is no checkout")
    said = "".join((csrc / name).read_text() for name in ("options.h", "solvers.h"))

    def value(name):
        return re.search(rf"\b{name} = ([^;,]+)", said)[1]

    for name, names in ("Activation", ACTIVATIONS), ("Method", METHODS), ("Solver", ALL_SOLVERS):
        options = re.search(rf"enum class {name} : int {{ (.*) }};", said)[1].replace("automatic", "auto")
        assert tuple(options.split(", ")) == names
        assert int(value(f"k{name}s")) == len(names)
    assert int(value("kNewtonPasses")) == NEWTON_PASSES
    assert int(value("kShootingPasses")) == SHOOTING_PASSES
    for kind, dtype in ("C", torch.float32), ("double", torch.float64):
        small = re.search(rf"{kind} kSmall\S* = (?:C\()?(0x1p-\d+)", said)[1]
        assert float.fromhex(small) == SMALL * torch.finfo(dtype).eps
    assert eval(value("kMostSpread")) == MOST_SPREAD


# Bad input.


@cells
def test_bad_arguments(cell):
    u, weights, state = cell.problem(2, 4, 3)
    first = "h0" if cell is GRU else "state0[0]"
    good = {"u": u, "weights": weights, "state": state}
    wrong_types = [
        ({"u": u.int()}, "u must be float32, bfloat16, float16 or float64, got int32"),
        ({"state": ([1.0], *state[1:])}, f"{first} must be a torch.Tensor, got list"),
        ({"return_info": 1}, "return_info must be a bool, got 1"),
        ({"cu_seqlens": [0, 4]}, "cu_seqlens must be a torch.Tensor, got list"),
        ({"cu_seqlens": torch.tensor([0.0, 4])}, "cu_seqlens must be int32 or int64, got float32"),
    ]
    wrong_values = [
        ({"u": u[:, :, :2]}, "u must have shape (B, T, 3, H), got shape (2, 4, 2, 3)"),
        ({"u": u[0]}, "u must have shape (B, T, 3, H), got shape (4, 3, 3)"),
        ({"weights": (weights[0][:2], *weights[1:])}, "weight must have shape (3, H) = (3, 3), got"),
        ({"weights": (weights[0].double(), *weights[1:])}, "weight must have the dtype of u (float32)"),
        ({"state": [part[:1] for part in state]}, f"{first} must have shape (B, H) = (2, 3), got"),
        ({"state": [part.half() for part in state]}, f"{first} must have the dtype of u"),
        ({"solver": "jacobi"}, "solver must be one of auto, sequential, newton, shooting, got 'jacobi'"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "u must have B = 1 with cu_seqlens"),
    ]
    if cell is not GRU:
        peephole = {"weights": (weights[0], weights[1][:1])}
        wrong_values.append((peephole, "peephole must have shape (2, H) = (2, 3), got shape (1, 3)"))
        wrong_types.append(({"state": u}, "state0 must be a pair (h0, c0), got"))
    one = {"u": u[:1], "state": tuple(part[:1] for part in state)}
    for bounds, message in [
        ([[0, 4]], "cu_seqlens must have shape (S + 1,) for S sequences, got shape (1, 2)"),
        ([], "cu_seqlens must have shape (S + 1,)"),
        ([0, 3], "cu_seqlens must go from 0 to T = 4, got one from 0 to 3"),
        ([1, 4], "cu_seqlens must go from 0 to T = 4, got one from 1 to 4"),
        ([0, 3, 2, 4], "cu_seqlens must not decrease, got 2 after 3 at 2"),
        ([0, 2, 4], f"{first} must have shape (S, H) = (2, 3), got shape (1, 3)"),
    ]:
        wrong_values.append((one | {"cu_seqlens": torch.tensor(bounds, dtype=torch.int64)}, message))
    cases = [(TypeError, *case) for case in wrong_types] + [(ValueError, *case) for case in wrong_values]
    for error, replaced, message in cases:
        with pytest.raises(error, match=f"^{cell.name}: {re.escape(message)}"):
            cell.run(**(good | replaced))
