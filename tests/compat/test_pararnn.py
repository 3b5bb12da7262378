"""pararnn-torch with our recurrences beneath it and without: the same states, gradients, training, errors."""

import math
from collections.abc import Callable
from functools import partial
from importlib import metadata

import pytest
import torch
from alike import EXACT, SINGLE, assert_alike, attributes, gradients
from torch import Tensor, nn

try:
    metadata.version("pararnn-torch")
except metadata.PackageNotFoundError:
    pytest.skip("pararnn-torch is not installed", allow_module_level=True)

pytest.importorskip("pararnn", reason="pararnn can't be imported", exc_type=ImportError)
import pararnn
from pararnn import NewtonConfig, NewtonDivergenceError, NewtonStats, ParaGRU, ParaLSTM, ParaRNN
from pararnn.solvers import newton, sequential

from fastsparse.compat import pararnn as adapter

B, T, D, H = 3, 17, 5, 6
CAP = 0.5
KINDS = {"gru": ParaGRU, "lstm": ParaLSTM}
SOLVED = NewtonConfig(max_iters=7, residual_atol=None)  # the library's Newton until nothing changes any more
SITES = {
    "sequential": "pararnn.solvers.sequential.sequential_apply",
    "newton": "pararnn.solvers.newton.newton_apply",
}
NEWTONS = 1e-6  # what its gradients are off by in double precision too: its backward runs in single
every_kind = pytest.mark.parametrize("kind", KINDS)
every_way = pytest.mark.parametrize("way", SITES)


def solve(way: str, cell: nn.Module, x: Tensor, h0: Tensor | None = None, **options) -> Tensor:
    """By the functions that the package exports."""
    if way == "sequential":
        return pararnn.sequential_apply(cell, x, h0, **options)
    return pararnn.newton_apply(cell, x, options.pop("config", SOLVED), h0=h0, **options)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def cell_of(kind: str, dtype: torch.dtype = torch.float64, cap: float | None = CAP) -> nn.Module:
    """Of whose recurrent weights about a third is beyond the cap, and one stands on it."""
    cell = KINDS[kind](D, H, max_recurrent_norm=cap, dtype=dtype)
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(cell.named_parameters()):
            parameter.copy_(0.5 * random(*parameter.shape, seed=10 + seed))
            if "." not in name:
                parameter[0], parameter[1], parameter[2] = CAP, -CAP, 2 * CAP
    return cell


def start_of(kind: str, batch: int = B, dtype: torch.dtype = torch.float64) -> Tensor:
    return random(batch, *((2,) if kind == "lstm" else ()), H, seed=2, dtype=dtype)


def within(way: str, dtype: torch.dtype = torch.float64) -> float:
    if dtype == torch.float32:
        return 3 * SINGLE
    return EXACT if way == "sequential" else NEWTONS


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


@pytest.fixture(autouse=True)
def unpatched(monkeypatch):
    monkeypatch.setattr(adapter.LIBRARY, "least_work", adapter.LIBRARY.least_work)
    yield
    adapter.undo()


def refusals() -> set[str]:
    return {why for _, why in adapter.status().refused}


def served(way: str) -> int:
    return adapter.status().served[SITES[way]]


def with_and_without(run: Callable, on_refuse: str = "raise") -> tuple:
    """What a run gives by the library's own code, and by ours."""
    without = run()
    with adapter.apply(least_work=0, on_refuse=on_refuse):
        before = adapter.status().served.total()
        ours = run()
        assert adapter.status().served.total() > before
        return without, ours


# States and gradients.


@every_kind
@every_way
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("cap", [CAP, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_states_and_gradients(kind, way, start, cap, dtype):
    def run():
        cell, x = cell_of(kind, dtype, cap), leaf(random(B, T, D, dtype=dtype))
        h0 = leaf(start_of(kind, dtype=dtype)) if start else None
        states = solve(way, cell, x, h0)
        (states * random(*states.shape, seed=3, dtype=dtype)).sum().backward()
        assert states.is_contiguous()
        return states, x.grad, h0 if h0 is None else h0.grad, gradients(cell)

    without, ours = with_and_without(run)
    assert_alike(ours, without, within(way, dtype))
    for name, grad in ours[-1].items():
        if "." not in name:  # no gradient passes the clamp from beyond, but from where it stands
            assert (grad[2] == 0) == (cap is not None)
            assert grad[0] != 0
            assert grad[1] != 0


@every_kind
def test_the_two_ways_are_one(kind):
    cell, x = cell_of(kind), random(B, T, D)
    with adapter.apply(least_work=0, on_refuse="raise"):
        loop = solve("sequential", cell, x)
        assert torch.equal(solve("newton", cell, x, config=None), loop)
        assert torch.equal(solve("newton", cell, x, config=NewtonConfig(max_iters=None)), loop)
        report = pararnn.verify_agreement(cell.float(), x.float())
    assert report.ok
    assert report.max_abs == 0


@every_kind
def test_newton_as_it_is_by_default(kind):
    """Then the library's own is off by what its tolerance leaves."""

    def run():
        cell, x = cell_of(kind, torch.float32), leaf(random(B, T, D, dtype=torch.float32))
        states = solve("newton", cell, x, config=None)
        (states * random(*states.shape, seed=3, dtype=torch.float32)).sum().backward()
        return states, x.grad, gradients(cell)

    assert_alike(*reversed(with_and_without(run)), within=1e-4)


@every_kind
@every_way
def test_gradients_by_finite_differences(kind, way):
    """Of the inputs, the start and all parameters, these in the places of the cell's own."""
    cell = cell_of(kind, cap=None)
    names = [name for name, _ in cell.named_parameters()]

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = cell

        def forward(self, x, h0):
            return solve(way, self.cell, x, h0)

    def run(x, h0, *parameters):
        given = {f"cell.{name}": parameter for name, parameter in zip(names, parameters, strict=True)}
        return torch.func.functional_call(Call(), given, (x, h0))

    inputs = (random(2, 4, D), start_of(kind, 2), *cell.parameters())
    with adapter.apply(least_work=0, on_refuse="raise"):
        torch.autograd.gradcheck(run, [leaf(tensor) for tensor in inputs], fast_mode=True)
        torch.autograd.gradgradcheck(run, [leaf(tensor) for tensor in inputs], fast_mode=True)


@every_kind
@pytest.mark.parametrize("frozen", ["all but h0", "all but x", "parameters but a", "nothing wanted"])
@every_way
def test_some_gradients(kind, frozen, way):
    def run():
        cell, x, h0 = cell_of(kind), random(B, T, D), start_of(kind)
        cell.requires_grad_(False)
        if frozen == "all but h0":
            h0.requires_grad_()
        elif frozen == "all but x":
            x.requires_grad_()
        elif frozen == "parameters but a":
            cell.a_z.requires_grad_()
        states = solve(way, cell, x, h0)
        if states.requires_grad:
            states.pow(3).sum().backward()
        return states, x.grad, h0.grad, gradients(cell)

    assert_alike(*reversed(with_and_without(run)), within=within(way))


@every_kind
def test_gradient_of_one_state_of_two(kind):
    def run(slot):
        cell, x = cell_of(kind), leaf(random(B, T, D))
        states = solve("sequential", cell, x)
        part = states if kind == "gru" else states[:, :, slot]
        part[:, ::3].square().sum().backward()
        return x.grad, gradients(cell)

    for slot in (0, 1):
        assert_alike(*reversed(with_and_without(partial(run, slot))))


# Second derivatives: the loop's.


def penalised(way: str, kind: str, again: bool) -> tuple:
    """A loss of the gradient's size, and all its gradients; ``again`` goes on from the end, an input too."""
    cell, x, h0 = cell_of(kind), leaf(random(B, T, D)), leaf(start_of(kind))
    states = solve(way, cell, x, h0)
    if again:
        end = states[:, -1]
        states = solve(way, cell, x.sin() + end.flatten(1)[:, None, :D], end)
    first = torch.autograd.grad(states.pow(3).sum(), (x, h0, *cell.parameters()), create_graph=True)
    loss = sum(grad.square().sum() for grad in first) + states.sum()
    loss.backward()
    return loss, x.grad, h0.grad, gradients(cell)


@every_kind
@pytest.mark.parametrize("again", [False, True])
def test_second_derivatives(kind, again):
    without, ours = with_and_without(partial(penalised, "sequential", kind, again))
    assert_alike(ours, without)
    with adapter.apply(least_work=0, on_refuse="raise"):
        assert_alike(penalised("newton", kind, again), without)


@every_kind
def test_gradients_kept_for_more_than_one_backward(kind):
    def run():
        cell, x = cell_of(kind), leaf(random(B, T, D))
        loss = solve("sequential", cell, x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        return x.grad, gradients(cell)

    assert_alike(*reversed(with_and_without(run)))


@every_kind
def test_many_gradients_at_once(kind):
    def run():
        x = leaf(random(2, 4, D))
        return torch.autograd.functional.jacobian(
            partial(solve, "sequential", cell_of(kind)), x, vectorize=True
        )

    assert_alike(*reversed(with_and_without(run)))


# Sizes and layouts.


@every_kind
@every_way
@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (1, T), (B, 1), (2, 130)])
def test_sizes(kind, way, batch, steps):
    def run():
        cell, x, h0 = cell_of(kind), leaf(random(batch, steps, D)), leaf(start_of(kind, batch))
        states = solve(way, cell, x, h0)
        states.pow(3).sum().backward()
        return states, x.grad, h0.grad, gradients(cell)

    assert_alike(*reversed(with_and_without(run)), within=within(way))


@every_kind
def test_an_empty_batch(kind):
    def run():
        cell, x = cell_of(kind), leaf(random(0, T, D))
        states = solve("sequential", cell, x)
        states.sum().backward()
        return states, x.grad, gradients(cell)

    assert_alike(*reversed(with_and_without(run)))


LAYOUTS = {
    "steps apart": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "features apart": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "features first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "time first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "one of all": lambda x: x[:1].expand(B, -1, -1),
}


@every_kind
@every_way
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(kind, way, layout):
    def run():
        cell, base = cell_of(kind), leaf(random(B, T, D))
        x, h0 = LAYOUTS[layout](base), start_of(kind).repeat_interleave(2, dim=-1)[..., ::2]
        assert not x.is_contiguous()
        states = solve(way, cell, x, h0)
        upstream = random(*states.transpose(0, 1).shape, seed=3).transpose(0, 1)
        states.backward(upstream)
        return states, base.grad, gradients(cell)

    assert_alike(*reversed(with_and_without(run)), within=within(way))


@every_kind
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@every_way
def test_without_gradients(kind, mode, way):
    def run():
        with mode():
            return solve(way, cell_of(kind), random(B, T, D), start_of(kind)) + 0

    without, ours = with_and_without(run)
    assert_alike(ours.clone(), without.clone())


@every_kind
def test_the_loops_states_may_be_written_to(kind):
    def run():
        cell, x = cell_of(kind), leaf(random(B, T, D))
        states = solve("sequential", cell, x)
        states *= 2
        states[:, 0] = 1
        states.square().sum().backward()
        return states, x.grad, gradients(cell)

    assert_alike(*reversed(with_and_without(run)))


# Precision.


@every_kind
@every_way
def test_autocast(kind, way):
    def run(inside):
        cell = cell_of(kind, torch.float32)
        x, h0 = (leaf(tensor.float()) for tensor in (random(B, T, D), start_of(kind)))
        with torch.autocast("cpu", torch.bfloat16):
            states = solve(way, cell, x, h0)
            loss = states.square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return states, x.grad, h0.grad, gradients(cell)

    for inside in (False, True):
        without, ours = with_and_without(partial(run, inside))
        assert ours[0].dtype == without[0].dtype == torch.float32
        assert_alike(ours, without, 3 * SINGLE)


@every_kind
def test_autocast_rounds_the_loops_product_alone(kind):
    cell, x = cell_of(kind, torch.float32), random(B, T, D, dtype=torch.float32)
    with adapter.apply(least_work=0, on_refuse="raise"):
        loop, solved = (solve(way, cell, x) for way in SITES)
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(solve("sequential", cell, x), loop)
            assert torch.equal(solve("newton", cell, x), solved)


@every_kind
@every_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_farther_off(kind, way, dtype):
    exact = solve("sequential", cell_of(kind, dtype).double(), random(B, T, D, dtype=dtype).double())

    def run():
        cell, x = cell_of(kind, dtype), leaf(random(B, T, D, dtype=dtype))
        states = solve(way, cell, x, config=None) if way == "newton" else solve(way, cell, x)
        states.float().square().sum().backward()
        assert states.dtype == x.grad.dtype == dtype
        return (states - exact).abs().max(), x.grad

    (theirs, grad), (ours, grad_) = with_and_without(run)
    assert ours <= theirs + torch.finfo(dtype).eps
    assert_alike(grad_, grad, 64 * torch.finfo(dtype).eps)


# The layer.


@every_kind
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, {"batch_first": False}, {"return_hidden": True}, {"num_layers": 3}])
def test_layer(kind, training, options):
    def run():
        torch.manual_seed(3)
        layer = ParaRNN(KINDS[kind](D, H, dtype=torch.float64), config=SOLVED, **options).train(training)
        x = leaf(random(B, T, D) if options.get("batch_first", True) else random(T, B, D))
        out = layer(x, [start_of(kind)] * options.get("num_layers", 1))
        parts = out if isinstance(out, tuple) else (out,)
        sum(part.pow(3).sum() for part in parts).backward()
        return parts, x.grad, gradients(layer)

    before = served("newton" if training else "sequential")
    assert_alike(*reversed(with_and_without(run)), within=NEWTONS)
    assert served("newton" if training else "sequential") == before + options.get("num_layers", 1)


def test_layer_laid_out_as_pytorchs():
    def run():
        torch.manual_seed(3)
        layer = ParaRNN(ParaLSTM(D, H, dtype=torch.float64), hidden_layout="pytorch", config=SOLVED)
        out, (h, c) = layer(random(B, T, D), start_of("lstm"))
        return out, h, c

    assert_alike(*reversed(with_and_without(run)))


@every_kind
@pytest.mark.parametrize("solver", ["auto", "sequential"])
def test_training(kind, solver):
    def run():
        torch.manual_seed(4)
        layer = ParaRNN(KINDS[kind](D, H, dtype=torch.float64), num_layers=2, config=SOLVED, solver=solver)
        optimizer, losses = torch.optim.Adam(layer.parameters(), lr=0.05), []
        for step in range(20):
            x = random(B, 9, D, seed=step)
            loss = nn.functional.mse_loss(layer(x).cumsum(2), x[..., :1].roll(1, 1).expand(-1, -1, H))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, layer.state_dict()

    without, ours = with_and_without(run)
    assert_alike(ours, without, 1e-7 if solver == "sequential" else 1e-5)
    assert len(set(ours[0])) == 20
    assert set(ours[1]) == set(ParaRNN(KINDS[kind](D, H), num_layers=2).state_dict())


@every_kind
def test_checkpointed(kind):
    def run():
        torch.manual_seed(3)
        layer, x = ParaRNN(KINDS[kind](D, H, dtype=torch.float64), config=SOLVED), leaf(random(B, T, D))
        out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        out.square().sum().backward()
        return out, x.grad, gradients(layer)

    assert_alike(*reversed(with_and_without(run)), within=NEWTONS)


@every_kind
@pytest.mark.parametrize("solver", ["newton", "sequential"])
def test_pages_and_drafts_call_them_too(kind, solver):
    def run():
        torch.manual_seed(3)
        layer = ParaRNN(KINDS[kind](D, H, dtype=torch.float64), config=SOLVED).eval()
        head = random(H, 7)
        with torch.no_grad():
            found = pararnn.verify_linear_draft(
                layer,
                random(B, 4, D),
                torch.zeros(B, 4, dtype=torch.int64),
                lambda h: h @ head,
                solver=solver,
            )
        return found.n_accepted, found.hidden, found.logits

    assert_alike(*reversed(with_and_without(run)))


# What is told of Newton's method.


@every_kind
@pytest.mark.parametrize("atol", [1e-5, None])
def test_stats(kind, atol):
    def run():
        stats = NewtonStats()
        config = NewtonConfig(max_iters=7, residual_atol=atol)
        states = solve(
            "newton", cell_of(kind, torch.float32), random(B, T, D).float(), config=config, stats=stats
        )
        return stats, states

    (theirs, _), (ours, states) = with_and_without(run)
    assert 0 <= ours.max_residual < 1e-6
    assert ours.scan_backend == theirs.scan_backend
    assert ours.picard_iters == theirs.picard_iters
    assert (ours.iters == 7) == (theirs.iters == 7) == (atol is None)
    assert 1 <= ours.iters <= theirs.iters
    assert bool(ours.residual_history) == bool(theirs.residual_history)
    cell, x = cell_of(kind, torch.float32), random(B, T, D).float()
    before = torch.cat((torch.zeros_like(states[:, :1]), states[:, :-1]), dim=1)
    right = (cell.step(before, x) - states).abs().max()
    assert math.isclose(ours.max_residual, right.item(), abs_tol=2e-7)


@every_kind
def test_residuals_of_many_blocks(kind, monkeypatch):
    """However many there are, each goes on from where the one before ended."""
    for block in (1, 5 * 2 * B * H, 1 << 20):
        monkeypatch.setattr(adapter, "BLOCK", block)
        with adapter.apply(least_work=0, on_refuse="raise"):
            stats = NewtonStats()
            solve("newton", cell_of(kind), random(B, T, D), start_of(kind), stats=stats)
        assert stats.max_residual < 1e-15


@every_kind
@pytest.mark.parametrize("step", [0, T - 1])
def test_what_is_not_finite_is_an_error(kind, step):
    x = random(B, T, D)
    x[1, step, 2] = math.nan

    def error():
        with pytest.raises(
            NewtonDivergenceError, match=r"residual nan after .* exceeds residual_fail=1 "
        ) as it:
            solve("newton", cell_of(kind), x, config=None)
        return it.value

    error()
    with adapter.apply(least_work=0, on_refuse="raise"):
        error()
        states = solve("newton", cell_of(kind), x, config=NewtonConfig(residual_fail=None))
        assert torch.equal(states.isnan(), solve("sequential", cell_of(kind), x).isnan())
    loop = solve("sequential", cell_of(kind), x)
    assert torch.equal(states.isnan(), loop.isnan())
    assert loop[1, step:].isnan().all()
    assert not loop[1, :step].isnan().any()
    assert not loop[::2].isnan().any()


@every_kind
def test_a_bound_on_residuals_is_kept(kind):
    cell, x = cell_of(kind, torch.float32), 3 * random(B, T, D).float()
    with (
        adapter.apply(least_work=0, on_refuse="raise"),
        pytest.raises(NewtonDivergenceError, match="exceeds residual_fail=1e-12"),
    ):
        solve("newton", cell, x, config=NewtonConfig(residual_fail=1e-12))


@every_kind
def test_large_inputs_stay_finite(kind):
    def run():
        return solve("newton", cell_of(kind), 1e6 * random(B, T, D), config=NewtonConfig(residual_fail=1e-2))

    without, ours = with_and_without(run)
    assert_alike(ours, without, 1e-6)
    assert ours.isfinite().all()


# What is refused.


def hooked(cell: nn.Module) -> nn.Module:
    cell.W_x.register_forward_hook(lambda module, inputs, output: output * 2)
    return cell


def with_own_step(cell: nn.Module) -> nn.Module:
    inner = cell.step
    cell.step = lambda h, x, wx=None: inner(h, x, wx=wx) / 2
    return cell


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


def with_own_product(cell: nn.Module) -> nn.Module:
    cell.W_x = Halved(D, 3 * H, dtype=torch.float64)
    nn.init.constant_(cell.W_x.weight, 0.1)
    nn.init.zeros_(cell.W_x.bias)
    return cell


class Other(ParaGRU):
    def step(self, h_prev, x=None, *, wx=None):
        return super().step(h_prev, x, wx=wx) / 2


def heads() -> nn.Module:
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match="block-diagonal"):
        return ParaGRU(D, H, mix="head", n_heads=2, dtype=torch.float64)


def other() -> nn.Module:
    torch.manual_seed(5)
    return Other(D, H, dtype=torch.float64)


gru = partial(cell_of, "gru")
CALLS = {
    "a subclass": (lambda way: solve(way, other(), random(B, T, D)), "another cell"),
    "heads": (lambda way: solve(way, heads(), random(B, T, D)), "a recurrence that mixes channels"),
    "its own step": (
        lambda way: solve(way, with_own_step(gru()), random(B, T, D)), "a cell with a method of its own",
    ),
    "its own product": (
        lambda way: solve(way, with_own_product(gru()), random(B, T, D)),
        "an input product of another class",
    ),
    "hooks": (lambda way: solve(way, hooked(gru()), random(B, T, D)), "hooks"),
    "lengths": (
        lambda way: solve(
            way, gru(), random(1, T, D), cu_seqlens=torch.tensor([0, 4, T]), h0=start_of("gru", 2)
        ),
        "sequences of different lengths",
    ),
    "dtypes": (
        lambda way: solve(way, gru(), random(B, T, D).float()),
        "dtypes that differ, or such as our ops don't take",
    ),
    "another dtype": (
        lambda way: solve(way, gru().to(torch.complex128), random(B, T, D).to(torch.complex128)),
        "dtypes that differ, or such as our ops don't take",
    ),
    "device": (
        lambda way: solve(way, gru().to("meta"), random(B, T, D).to("meta"), **unchecked(way)).shape,
        "a device other than the CPU",
    ),
    "no tensor": (lambda way: solve(way, gru(), [1.0]), "not a plain tensor"),
    "width": (lambda way: solve(way, gru(), random(B, T, D + 1)), "the shape of x"),
    "no batch": (lambda way: solve(way, gru(), random(T, D)), "the shape of x"),
    "no steps": (lambda way: solve(way, gru(), random(B, 0, D)), "no steps"),
    "one start for all": (lambda way: solve(way, gru(), random(B, T, D), random(1, H)), "the shape of h0"),
    "dual": (lambda way: dual(way), "forward-mode derivatives"),
}  # fmt: skip


def unchecked(way: str) -> dict:
    return {"config": NewtonConfig(residual_atol=None, residual_fail=None)} if way == "newton" else {}


def dual(way: str) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(random(B, T, D), random(B, T, D, seed=1))
        out = torch.autograd.forward_ad.unpack_dual(solve(way, gru(), x))
        return out.primal, out.tangent


def outcome(call: Callable):
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


@pytest.mark.filterwarnings("ignore:Complex modules", "ignore:.*torch.jit")
@every_way
@pytest.mark.parametrize("name", CALLS)
def test_refused(way, name):
    call, why = CALLS[name]
    right = outcome(partial(call, way))
    before = served(way)
    with adapter.apply(least_work=0):
        assert_alike(outcome(partial(call, way)), right)
    assert (SITES[way], why) in adapter.status().refused
    if name != "lengths":  # whose sequences one by one may be served
        assert served(way) == before
    with adapter.apply(least_work=0, on_refuse="raise"):
        assert f"served by the library's own code: {why}" in outcome(partial(call, way))[1]


CONFIGS = {
    "one iteration": ({"max_iters": 1}, "fewer than three iterations"),
    "two iterations": ({"max_iters": 2}, "fewer than three iterations"),
    "damped": ({"omega": 0.9}, "damping"),
    "eager": ({"scan_backend": "eager"}, "a named backend"),
    "fused": ({"scan_backend": "fused"}, "a named backend"),
    "by autograd": ({"jacobian": "autograd"}, "a named Jacobian"),
    "structured": ({"jac_structure": "diag"}, "a named Jacobian"),
    "logarithms": ({"coords": "log"}, "other coordinates"),
    "windows": ({"chunk_len": 4}, "windows of time"),
    "fused windows": ({"fused_time_loop": True}, "windows of time"),
    "picard": ({"picard_iters": 1}, "config.picard_iters"),
    "schedule": ({"max_iters": None, "newton_iters_by_t": {1: 4}}, "config.newton_iters_by_t"),
    "again": ({"recompute": True}, "states that are computed again in backward"),
    "tiles": ({"scan_tile": "seq"}, "config.scan_tile"),
    "bound": ({"residual_fail": -1.0}, "a bound on residuals that is none"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_are_refused(name):
    options, why = CONFIGS[name]

    def run():
        return outcome(lambda: solve("newton", gru(), random(B, T, D), config=NewtonConfig(**options)))

    right = run()
    with adapter.apply(least_work=0):
        assert_alike(run(), right)
    assert (SITES["newton"], why) in adapter.status().refused


@pytest.mark.parametrize(
    "options",
    [
        {"max_iters": 3}, {"max_iters": None}, {"residual_atol": None}, {"residual_fail": None},
        {"picard_adapt": False}, {"verify_first_step": True},
    ],
)  # fmt: skip
def test_configs_that_are_served(options):
    def run():
        return solve("newton", gru(), random(B, T, D), config=NewtonConfig(**options))

    assert_alike(*reversed(with_and_without(run)), within=1e-4)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (
            lambda: solve("sequential", gru(), random(B, T, D), step=lambda h, x: h),
            "a step of the caller's own",
        ),
        (lambda: solve("newton", gru(), random(0, T, D)), "an empty batch"),
        (
            lambda: solve("newton", gru(), random(B, T, D), random(4, H), block_table=torch.arange(B)),
            "a block table",
        ),
        (lambda: solve("newton", gru(), random(B, T, D), config=object()), "a config of another class"),
        (
            lambda: half_autocast(cell_of("lstm", torch.float16), random(B, T, D, dtype=torch.float16)),
            "autocast to another half precision",
        ),
    ],
)
def test_what_one_of_them_refuses(call, why):
    right = outcome(call)
    with adapter.apply(least_work=0):
        assert_alike(outcome(call), right)
    assert why in refusals()


def half_autocast(cell: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return solve("sequential", cell, x)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit")
@every_way
def test_traced_it_is_the_librarys_own(way):
    cell, x = gru().requires_grad_(False), random(B, 4, D)
    with adapter.apply(least_work=0):
        torch.jit.trace(lambda x: solve("sequential", cell, x), x)
        assert (SITES["sequential"], "tracing") in adapter.status().refused


@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_compiled_and_transformed_it_is_the_librarys_own():
    cell, x = gru(), random(B, 4, D)
    right = solve("sequential", cell, x)
    with adapter.apply(least_work=0, on_refuse="raise"):
        torch._dynamo.reset()
        before = served("sequential")
        assert_alike(torch.compile(partial(solve, "sequential", cell), backend="eager")(x), right)
        assert_alike(torch.func.vmap(lambda one: solve("sequential", cell, one[None])[0])(x), right)
        assert served("sequential") == before


@every_kind
def test_little_work_is_the_librarys_own(kind):
    cell = cell_of(kind)
    with adapter.apply():
        for way in SITES:
            before = served(way)
            solve(way, cell, random(B, 1, D))
            assert served(way) == before
            solve(way, cell, random(B, 64, D))
            assert served(way) == before + 1
    assert "little work" in refusals()


# Applied and undone.


def test_undo_leaves_nothing():
    before = attributes("pararnn")
    with adapter.apply():
        patched = attributes("pararnn")
        changed = {name for name in before if patched[name] is not before[name]}
        for module in (
            "pararnn",
            "pararnn.solvers",
            "pararnn.layers.para_rnn",
            "pararnn.paged",
            "pararnn.verify",
        ):
            for name in ("newton_apply", "sequential_apply"):
                assert f"{module}.{name}" in changed
        assert {name.rpartition(".")[2] for name in changed} == {"newton_apply", "sequential_apply"}
    after = attributes("pararnn")
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


@pytest.mark.parametrize("method", ["_recurrence", "clipped_a"])
def test_cells_of_other_equations_are_not_served(monkeypatch, method):
    monkeypatch.setattr(ParaGRU, method, lambda self, *arguments, **named: None)
    with pytest.raises(
        RuntimeError, match=rf"pararnn: pararnn.cells.para_gru.ParaGRU.{method} isn't what was"
    ):
        adapter.apply()
    assert not adapter.status().applied
    assert newton.newton_apply is pararnn.newton_apply
    assert sequential.sequential_apply is pararnn.sequential_apply
    adapter.apply(force=True)


def test_no_module_is_converted():
    """What is replaced are functions."""
    with pytest.raises(TypeError, match="pararnn: module must be of a class that is served"):
        adapter.convert(ParaRNN(ParaGRU(D, H)))
