"""newton_recurrence: recurrences of the user's own, by Newton's method, certified, with their gradient."""

import re
from functools import partial

import pytest
import torch
from backends import backend_names, host_backend_names, running
from oracle import random
from recurrences import CELLS
from torch.utils.checkpoint import checkpoint

import fastsparse
from fastsparse.reference._solvers import small

# It is made of an op, which has tests of its own on every level of the CPU.
BACKENDS = [name for name in backend_names() if name not in host_backend_names()[1:-1]]
cells = pytest.mark.parametrize("cell", CELLS.values(), ids=list(CELLS))


@pytest.fixture(params=BACKENDS)
def backend(request):
    with running(request.param):
        yield request.param


def elman(weight):
    """A plain recurrence, of which one weight a channel goes back."""
    return lambda h, x: torch.tanh(weight * h + x)


def stepped(cell, *weights):
    """Of a gated recurrence; of pairs (c, h) where it has two states."""
    if cell.states == 1:
        return lambda h, u: cell.step((h,), u, weights)[0]
    return lambda state, u: torch.stack(cell.step(state.unbind(-2)[::-1], u, weights)[::-1], dim=-2)


def start_of(cell, state):
    return state[0] if cell.states == 1 else torch.stack(state[::-1], dim=1)


def jacobian_of(cell):
    return "diagonal" if cell.states == 1 else "block"


def loop(step, x, h0):
    h, states = h0, []
    for t in range(x.shape[1]):
        h = step(h.unsqueeze(1), x[:, t : t + 1]).squeeze(1)
        states.append(h)
    return torch.stack(states, dim=1)


@cells
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("T", [1, 2, 129])
def test_it_is_the_gated_recurrence(backend, cell, T, dtype):
    slack = 64 * torch.finfo(dtype).eps
    u, weights, state = cell.problem(3, T, 5, dtype=dtype)
    start = start_of(cell, state)
    h, info = fastsparse.newton_recurrence(stepped(cell, *weights), u, start, jacobian=jacobian_of(cell))
    right = cell.run(u, weights, state)
    right = right[0] if cell.states == 1 else torch.stack(right[::-1], dim=2)
    torch.testing.assert_close(h, right, rtol=slack, atol=slack)
    assert info.converged.shape == info.residual.shape == info.iterations.shape == (3, 5)
    assert info.residual.max() <= slack
    if backend != "reference":
        assert info.converged.all()
        assert (info.iterations > 0).all()


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("weight", [0.5, -3.0, 30.0])
def test_what_does_not_converge_is_stepped_through(weight, damping):
    """Each channel on its own; the answer is the loop's, and info says which."""
    x, h0 = random(3, 200, 4, seed=1), random(3, 4, seed=2)
    step = elman(torch.tensor([0.1, weight, 0.3, weight]))
    h, info = fastsparse.newton_recurrence(step, x, h0, max_iter=9, damping=damping)
    torch.testing.assert_close(h, loop(step, x, h0), rtol=1e-5, atol=1e-5)
    assert info.residual.max() < 1e-5
    if not damping:
        assert info.converged[:, [0, 2]].all()
        assert (info.iterations[:, [0, 2]] < 9).all()
        assert info.converged[:, [1, 3]].all() == (weight == 0.5)
        assert (info.iterations[~info.converged] == 9).all()


def test_damping_helps_where_newtons_method_overshoots():
    """A logistic map, which the first corrections throw far out of where it comes to rest."""
    x, h0 = torch.zeros(2, 200, 3), torch.full((2, 3), 0.3)

    def step(h, x):
        return 2.6 * h * (1 - h) + x

    h, plain = fastsparse.newton_recurrence(step, x, h0)
    assert not plain.converged.any()
    damped, info = fastsparse.newton_recurrence(step, x, h0, damping=0.7)
    assert info.converged.all()
    torch.testing.assert_close(damped, h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_iter", [1, 20])
def test_nan_stays_in_its_channel(backend, max_iter):
    weight = random(5, seed=3)
    x, h0 = random(3, 60, 5, seed=1), random(3, 5, seed=2)
    clean, _ = fastsparse.newton_recurrence(elman(weight), x, h0)
    x[1, 20, 3] = torch.nan
    h, info = fastsparse.newton_recurrence(elman(weight), x, h0, max_iter=max_iter)
    others = torch.ones_like(h, dtype=torch.bool)
    others[1, 20:, 3] = False
    torch.testing.assert_close(h[others], clean[others], rtol=1e-5, atol=1e-5)
    assert h[~others].isnan().all()
    assert not info.converged[1, 3]


@pytest.mark.parametrize("max_iter", [1, 20])
def test_infinity_is_not_certified(backend, max_iter):
    """A correction that overflows makes its state infinite too, beside which it must not pass for small."""
    x, h0 = torch.tensor([-1.0, 1.0]).view(1, 2, 1), torch.zeros(1, 1)

    def step(h, x):
        return torch.where(x > 0, 3e38 * torch.tanh(40 * (h - 1)), 0 * h + 1.5)

    h, info = fastsparse.newton_recurrence(step, x, h0, max_iter=max_iter)
    assert torch.equal(h, loop(step, x, h0))
    assert h.isfinite().all()
    assert not info.converged.any()


def test_solvers_do_not_certify_infinity():
    h = torch.tensor([1.5, torch.inf]).view(1, 2, 1)
    assert not small(torch.tensor([0.0, torch.inf]).view(1, 2, 1), h)
    assert small(torch.zeros(1, 2, 1), h)


@pytest.mark.parametrize("max_iter", [1, 20])
@pytest.mark.parametrize("pairs", [(), (2,)], ids=["diagonal", "block"])
def test_a_step_may_hold_tensors_of_each_sequence(backend, pairs, max_iter):
    x, h0 = random(5, 40, *pairs, 3, seed=1), random(5, *pairs, 3, seed=2)
    context = random(5, 1, *pairs, 3, seed=3)

    def step(h, x):  # and pairs may mix
        return torch.tanh(0.5 * (h.flip(-2) if pairs else h) + x * context)

    h, _ = fastsparse.newton_recurrence(
        step, x, h0, jacobian="block" if pairs else "diagonal", max_iter=max_iter
    )
    torch.testing.assert_close(h, loop(step, x, h0), rtol=1e-5, atol=1e-5)


@cells
def test_gradcheck(backend, cell):
    """To the inputs, the first state, and what the step holds."""
    u, weights, state = cell.problem(2, 6, 2, dtype=torch.float64)

    def through(u, start, *weights):
        step = stepped(cell, *weights)
        return fastsparse.newton_recurrence(step, u, start, jacobian=jacobian_of(cell))[0].sin()

    leaves = [leaf.requires_grad_() for leaf in (u, start_of(cell, state), *weights)]
    assert torch.autograd.gradcheck(through, leaves, fast_mode=True)


@pytest.mark.parametrize("max_iter", [1, 20])
def test_gradients_of_modules(max_iter):
    """Which hold parameters; converged or stepped through."""
    cell = torch.nn.Module()
    cell.weight, cell.bias = (torch.nn.Parameter(random(4, seed=i)) for i in range(2))

    def step(h, x):
        return torch.tanh(cell.weight * h + x.float() + cell.bias)

    x, h0 = torch.arange(60).view(2, 30, 1) % 3, random(2, 4, seed=5)  # inputs may be tokens
    upstream = random(2, 30, 4, seed=6)
    h, _ = fastsparse.newton_recurrence(step, x, h0, max_iter=max_iter)
    found = torch.autograd.grad(h, list(cell.parameters()), upstream)
    right = torch.autograd.grad(loop(step, x, h0), list(cell.parameters()), upstream)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


def test_one_evaluation_of_step_is_kept_for_the_gradient():
    """And the derivative as numbers, without the graph that it came from."""
    weight = random(4, seed=3).requires_grad_()
    h, _ = fastsparse.newton_recurrence(elman(weight), random(2, 30, 4, seed=1), random(2, 4, seed=2))
    ahead, J = h.grad_fn.saved_tensors
    assert ahead.grad_fn is not None
    assert J.shape == h.shape
    assert not J.requires_grad


@cells
@pytest.mark.parametrize("max_iter", [1, 20])
@pytest.mark.parametrize("how", ["checkpoint", "reentrant checkpoint", "save_on_cpu"])
def test_hooks_for_saved_tensors(how, max_iter, cell):
    """As of activation checkpointing, inside of which gradients are those outside."""
    u, weights, state = cell.problem(2, 30, 4)
    leaves = [leaf.requires_grad_() for leaf in (u, start_of(cell, state), *weights)]

    def through(u, start, *weights):
        step, jacobian = stepped(cell, *weights), jacobian_of(cell)
        return fastsparse.newton_recurrence(step, u, start, jacobian=jacobian, max_iter=max_iter)[0].sin()

    plain = through(*leaves)
    plain.sum().backward()
    right = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    if how == "save_on_cpu":
        with torch.autograd.graph.save_on_cpu():
            h = through(*leaves)
            assert all(leaf.grad is None for leaf in leaves)
    else:
        h = checkpoint(through, *leaves, use_reentrant=how == "reentrant checkpoint")
    assert torch.equal(h, plain)
    h.sum().backward()
    torch.testing.assert_close([leaf.grad for leaf in leaves], right)


def test_a_step_that_does_not_look_back(backend):
    x = random(2, 9, 4, seed=1)
    with torch.autograd.graph.save_on_cpu():
        h, _ = fastsparse.newton_recurrence(lambda h, x: x.sin(), x, torch.zeros(2, 4))
    assert torch.equal(h, x.sin())
    assert torch.equal(fastsparse.newton_recurrence(lambda h, x: x.sin(), x, torch.zeros(2, 4))[0], h)


def test_torch_func_and_inference_mode():
    x, h0, weight = random(2, 30, 4, seed=1), random(2, 4, seed=2), random(4, seed=3)
    right = torch.func.vjp(lambda weight: loop(elman(weight), x, h0), weight)[1](x)
    found = torch.func.vjp(lambda weight: fastsparse.newton_recurrence(elman(weight), x, h0)[0], weight)[1](x)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        h, _ = fastsparse.newton_recurrence(elman(weight.clone()), x.clone(), h0.clone())
    torch.testing.assert_close(h, loop(elman(weight), x, h0), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_forward_mode(wanted):
    """Into what the step holds, the inputs and the first state, also from a level below another."""
    primals = tuple(
        random(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate([(4,), (2, 9, 4), (2, 4)])
    )
    tangents = tuple(random(*primals[i].shape, seed=5 + i, dtype=torch.float64) for i in wanted)

    def through(solve, *args):
        weight, x, h0 = (args[wanted.index(i)] if i in wanted else primals[i] for i in range(3))
        return solve(elman(weight), x, h0)

    def newton(*args):
        return fastsparse.newton_recurrence(*args)[0]

    def below(*args):
        return torch.func.vmap(torch.func.grad(lambda scale, h: (scale * h).sum()))(
            torch.ones(2, dtype=torch.float64), through(newton, *args)
        )

    inside = tuple(primals[i] for i in wanted)
    _, right = torch.func.jvp(partial(through, loop), inside, tangents)
    torch.testing.assert_close(torch.func.jvp(partial(through, newton), inside, tangents)[1], right)
    torch.testing.assert_close(torch.func.jvp(below, inside, tangents)[1], right.sum(dim=(1, 2)))
    with pytest.raises(NotImplementedError, match="second derivatives must be taken inside"):
        torch.func.jvp(
            lambda *args: torch.func.jvp(partial(through, newton), args, tangents)[1], inside, tangents
        )


def test_second_derivatives_are_the_references():
    x, h0, weight = (
        random(*shape, seed=1, dtype=torch.float64).requires_grad_() for shape in ((1, 4, 2), (1, 2), (2,))
    )

    def through(x, h0, weight):
        return fastsparse.newton_recurrence(elman(weight), x, h0)[0]

    with fastsparse.use_backend("reference"):
        assert torch.autograd.gradgradcheck(through, (x, h0, weight))
    (grad,) = torch.autograd.grad(through(x, h0, weight).sum(), x, create_graph=True)
    assert "NotImplementedError" in fastsparse.newton_recurrence.__doc__
    with pytest.raises(NotImplementedError, match="second derivatives must be taken inside"):
        grad.sum().backward()


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_nothing_to_do(backend, shape):
    x, h0 = torch.zeros(shape), torch.zeros(shape[0], shape[2])
    h, info = fastsparse.newton_recurrence(elman(torch.ones(shape[2])), x, h0)
    assert h.shape == shape
    assert info.converged.shape == (shape[0], shape[2])


ALONE = r"step must make each .* alone, as jacobian promises"
AT_ONCE = "step must make the same of time steps at once as of each alone"
MIXTURES = {
    "channels": (ALONE, lambda h, x: torch.tanh(h + 0.1 * h.roll(1, -1) + x)),
    "a mean": (ALONE, lambda h, x: h - h.mean(-1, keepdim=True) + x),
    "time": (ALONE, lambda h, x: torch.tanh(h.cumsum(1) + x)),
    "sequences": (ALONE, lambda h, x: h + 0.01 * h.sum(0, keepdim=True) + x),
    "inputs": (AT_ONCE, lambda h, x: torch.tanh(0.5 * h + x.cumsum(1))),
    "their mean": (AT_ONCE, lambda h, x: torch.tanh(0.5 * h + x - x.mean(1, keepdim=True))),
    "a count": (AT_ONCE, lambda h, x: torch.tanh(0.5 * h + torch.ones_like(x).cumsum(1))),
}


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("jacobian", ["diagonal", "block"])
def test_a_step_that_mixes_is_refused(name, jacobian):
    pairs = (2,) * (jacobian == "block")
    x, h0 = random(2, 9, *pairs, 4, seed=1), random(2, *pairs, 4, seed=2)
    message, step = MIXTURES[name]
    with pytest.raises(ValueError, match=f"^newton_recurrence: {message}"):
        fastsparse.newton_recurrence(step, x, h0, jacobian=jacobian)


def test_a_step_that_mixes_later_on_is_refused_a_gradient():
    x, h0 = torch.zeros(2, 30, 3, requires_grad=True), random(2, 3, seed=2)
    wild = torch.arange(30).view(1, -1, 1) > 20

    def step(h, x):
        return torch.where(x.abs() > 0.5, 0.5 * torch.tanh(h.roll(1, -1)), 0.9 * h) + x

    with pytest.raises(ValueError, match=r"step must make each state from its own alone"):
        fastsparse.newton_recurrence(step, x + wild, h0)


def test_a_step_that_writes_into_its_states_spoils_no_h0():
    h0 = torch.ones(2, 3)
    h, _ = fastsparse.newton_recurrence(lambda h, x: (0.5 * h).add_(x), torch.ones(2, 5, 3), h0)
    assert torch.equal(h0, torch.ones(2, 3))
    torch.testing.assert_close(h[:, 0], torch.full((2, 3), 1.5))
    with pytest.raises(RuntimeError, match="in-place"):
        fastsparse.newton_recurrence(lambda h, x: h.mul_(0.5), torch.ones(2, 5, 3), h0)
    assert torch.equal(h0, torch.ones(2, 3))


def test_inside_torch_compile():
    x, h0 = random(2, 20, 3, seed=1), random(2, 3, seed=2)

    def run(x, h0):
        return fastsparse.newton_recurrence(lambda h, x: torch.tanh(0.5 * h + x), 2 * x, h0)[0] + 1

    torch.testing.assert_close(torch.compile(run, backend="aot_eager")(x, h0), run(x, h0))


def test_bad_arguments():
    good = {"step": elman(torch.ones(3)), "x": torch.zeros(2, 5, 3), "h0": torch.zeros(2, 3)}
    wrong_types = [
        ({"step": 3}, "step must be a function of states and inputs, got 3 of type int"),
        ({"max_iter": 2.0}, "max_iter must be an int, got 2.0 of type float"),
        ({"x": [1.0]}, "x must be a torch.Tensor, got list"),
        ({"h0": good["h0"].half()}, "h0 must be float32 or float64, to converge in, got float16"),
    ]
    other_states = "step must return states like those it is given, of shape (2, 1, 3)"
    wrong_values = [
        ({"step": lambda h, x: 1}, other_states),
        ({"step": lambda h, x: h[..., :2]}, other_states),
        ({"step": lambda h, x: h.double()}, other_states),
        ({"step": lambda h, x: h[:, :1]}, "step must work on any number of time steps at once"),
        ({"jacobian": "full"}, "jacobian must be one of diagonal, block, got 'full'"),
        ({"max_iter": 0}, "max_iter must be at least 1, got max_iter=0"),
        ({"tol": -1.0}, "tol must be finite and at least 0, got tol=-1.0"),
        ({"damping": 1.0}, "damping must be less than 1, got damping=1.0"),
        ({"damping": -0.5}, "damping must be finite and at least 0, got damping=-0.5"),
        ({"x": torch.zeros(2)}, "x must have shape (B, T, ...), got shape (2,)"),
        ({"h0": torch.zeros(2, 2, 4)}, "h0 must have shape (B, H), got shape (2, 2, 4)"),
        ({"h0": torch.zeros(3, 3)}, "h0 and x must have one batch size, got shapes (3, 3) and (2, 5, 3)"),
    ]
    cases = [(TypeError, *case) for case in wrong_types] + [(ValueError, *case) for case in wrong_values]
    for error, replaced, message in cases:
        with pytest.raises(error, match=f"^newton_recurrence: {re.escape(message)}"):
            fastsparse.newton_recurrence(**(good | replaced))
