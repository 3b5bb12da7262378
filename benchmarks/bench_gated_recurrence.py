"""The gated recurrences, of every cell: given pre-activations, as a layer, and the errors.

Against a copy of as many bytes, which nothing can beat that reads its inputs from memory, a loop over time in
Python, and one whose body is compiled; (peers) pararnn-torch and PyTorch's own layer, whose recurrence mixes
all channels: another model, of as many inputs and channels. On a GPU with each solver on each backend; of a
layer FlashRNN's too.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import baselines, shapes
from benchmarks.bars import Bar, speed_bars
from benchmarks.cases import ANOTHER_MODEL, OURS
from benchmarks.cases import wrong as wrong_answers
from benchmarks.checks import close_all, state_errors
from benchmarks.harness import Contender, WrongAnswer
from benchmarks.lab import DTYPES, Job, Lab
from benchmarks.peers import pararnn_torch
from benchmarks.recurrences import (
    COMPILED,
    GRADIENT,
    GRU,
    LOOP,
    LSTM,
    OTHERS_MAY,
    SOLVERS,
    STATES,
    Cell,
    Layer,
    States,
    checked,
    copy_bars,
    forward,
)
from benchmarks.shapes import Given, Sequences, each, grid
from fastsparse import reference

# How many times as fast as pararnn-torch: on a CPU its two ways, and a layer; on a GPU its kernels.
OF_SEQUENTIAL, OF_NEWTON, OF_LAYER, OF_KERNELS = 25.0, 80.0, 6.0, 3.0
SCALES = (0.03, 0.1, 0.5, 1.0, 2.0, 4.0)  # of normal recurrent weights
STEPS = (1024, 65536)
CHANNELS = 16  # of every scale
UNIT = torch.finfo(torch.float32).eps  # in the last place of a state near 1
DRAWS = 4


def jobs(lab: Lab) -> Iterator[Job]:
    for cell in (GRU, LSTM):
        for given in wanted(lab):
            name = given.name("forward")
            run, bars = partial(case, lab, cell, given), partial(_bars, lab, cell, name, given)
            yield Job(cell.name, name, given, run, bars)
        if lab.choice:
            continue
        (shape,) = lab.shapes([shapes.GPU_RECURRENCES[0] if lab.gpu else shapes.RECURRENCE])
        given = Given(shape, priority=3 * lab.gpu)
        name = given.name("with its input product, forward + backward")
        required = {pararnn_torch.NEWTON: OF_LAYER} if lab.peers else {}
        bars = partial(speed_bars, f"{cell.name}, {name} ({shape})", required)
        yield Job(cell.name, name, given, partial(layer, lab, cell, shape), bars)
        if not lab.gpu and not lab.peers:
            for T in [min(steps, 64 * (i + 1)) for i, steps in enumerate(STEPS)] if lab.quick else STEPS:
                for s in SCALES:
                    yield _error_job(cell, s, T)


def wanted(lab: Lab) -> Iterator[Given]:
    """Every case given pre-activations."""
    if lab.choice:
        yield from grid(lab.shapes(shapes.GRID_RECURRENCES), kinds=[""])
    elif lab.gpu:
        headline, *others = lab.shapes(shapes.GPU_RECURRENCES)
        yield from (Given(headline, priority=1), Given(headline, "bf16", priority=3))
        yield from each(4, others, "fp32", kinds=[""])
    else:
        longer = () if lab.peers else shapes.LONG_RECURRENCES
        yield from each(0, lab.shapes([shapes.RECURRENCE, *longer]), "fp32", kinds=[""])


def _bars(lab: Lab, cell: Cell, name: str, given: Given, case: dict[str, Any]) -> list[Bar]:
    promised, where = given.shape.headline and given.dtype == "fp32", f"{cell.name}, {name} ({given.shape})"
    required = {}
    if lab.gpu:
        required = {pararnn_torch.NEWTON: OF_KERNELS}
    elif lab.peers:
        required = {pararnn_torch.SEQUENTIAL: OF_SEQUENTIAL, pararnn_torch.NEWTON: OF_NEWTON}
    return copy_bars(lab.gpu, where, promised, case) + speed_bars(where, required if promised else {}, case)


def case(lab: Lab, cell: Cell, given: Given) -> dict[str, Any]:
    """Given the pre-activations: what the op itself does."""
    shape, dtype = given.shape, given.dtype
    u, weights, exact = problem(cell, shape, dtype, lab.device)
    right, others = checked(exact, OTHERS_MAY[dtype]), []
    if lab.compiles and shape.headline and dtype == "fp32":  # compiling takes many seconds
        others.append(Contender(COMPILED, cell.compiled(u, weights), right, samples=5))
    if lab.libraries:
        for name, call in pararnn_torch.recurrence(cell, u, weights).items():
            if name == pararnn_torch.NEWTON or not lab.gpu:
                others.append(Contender(name, call, right, samples=3))
    run, what = partial(cell.run, u, weights), cell.work(shape, u.element_size())
    solvers = {} if lab.peers else {"solver": SOLVERS}
    return forward(
        lab, given, run, lambda few: cell.loop(u[:, :few], weights), exact, what, others, **solvers
    )


@lru_cache(maxsize=1)
def problem(
    cell: Cell, shape: Sequences, dtype: str, device: torch.device
) -> tuple[Tensor, list[Tensor], States]:
    """Pre-activations, weights, and the states in fp64."""
    u, weights = cell.problem(shape)
    u, *weights = (part.to(device, DTYPES[dtype]) for part in (u, *weights))
    return u, weights, cell.exact(u, weights)


def layer(lab: Lab, cell: Cell, shape: Sequences) -> dict[str, Any]:
    """Input product, recurrence, and the gradients of the inputs and of all weights."""
    own = Layer(cell, shape, lab.device)
    expected = own.expected()
    check = partial(close_all, expected, GRADIENT)
    contenders = lab.ours(own.ours, check)
    if lab.torchs:
        contenders.append(Contender(LOOP, own.loop, check, samples=3))
    if lab.libraries:
        peer = pararnn_torch.PararnnLayer(own)

        def check_peer(found: list[Tensor]) -> str:
            return close_all(expected, pararnn_torch.STATES, peer.arranged(found))

        contenders.append(Contender(pararnn_torch.NEWTON, peer.run, check_peer, samples=3))
        contenders.append(Contender(f"torch.nn.{cell.dense.__name__}", dense(own), finite, samples=3))
        if lab.gpu and cell.states > 1:  # FlashRNN has no GRU in Triton
            contenders.append(Contender(baselines.FLASHRNN, baselines.flashrnn(own), finite))
    return lab.measure(shape, contenders)


def dense(layer: Layer) -> Callable[[], list[Tensor]]:
    """PyTorch's layer of as many inputs and channels."""
    H = layer.x.shape[-1]
    module = layer.cell.dense(H, H, batch_first=True).to(layer.x.device)

    def run() -> list[Tensor]:
        h, _ = module(layer.x)
        return [h.detach(), *torch.autograd.grad(h, (layer.x, *module.parameters()), layer.upstream)]

    return run


def finite(found: list[Tensor]) -> str:
    if not all(bool(part.isfinite().all()) for part in found):
        raise WrongAnswer("not finite")
    return ANOTHER_MODEL


def _error_job(cell: Cell, s: float, T: int) -> Job:
    """What fp32 is off by, for weights of one scale and all solvers, beside a plain loop in fp32.

    A channel counts where a unit in the last place, lost in every step, upwards or downwards, and carried
    along by the exact recurrence, comes to no more than the tolerance. The others amplify rounding by more,
    in chaos without end: no arithmetic in fp32 can follow these, as the plain loop's own error shows, which
    stands beside ours.
    """
    name = f"error, weights of scale {s:g}, T={T}"
    given = Given(Sequences("errors", 1, T, CHANNELS))
    return Job(cell.name, name, given, partial(_error, cell, s, T), partial(_error_bars, cell, name))


@lru_cache(maxsize=1)
def _errors(cell: Cell, T: int) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Of every channel its scale, what losing units comes to, and by solver its error and its passes."""
    scale = torch.tensor(SCALES).repeat_interleave(CHANNELS)
    u, weights = cell.problem(Sequences("errors", 1, T, CHANNELS * len(SCALES)), 1.0)
    weights = [weight * scale for weight in weights]
    exact, passes = cell.exact(u, weights), {}
    with torch.no_grad():
        answers = {LOOP: cell.loop(u, weights)}
        for solver in SOLVERS:
            answers[f"{OURS}, {solver}"], took = cell.solved(u, weights, solver)
            passes[f"{OURS}, {solver}"] = took[0]
        loss = _amplified(cell, u, weights, exact)
    errors = {
        who: torch.stack([state_errors(*pair)[0] for pair in zip(states, exact, strict=True)]).amax(dim=0)
        for who, states in answers.items()
    }
    largest = torch.stack([right[0].abs().amax(dim=0) for right in exact]).amin(dim=0)
    return scale, loss[0].amax(dim=0) / largest, errors, passes


def _error(cell: Cell, s: float, T: int) -> dict[str, Any]:
    """The largest errors of channels that count, and of those that amplify rounding too much."""
    scale, lost, errors, passes = _errors(cell, T)
    here = scale == s
    counts = lost[here] <= STATES
    few = int(counts.sum())
    contenders = {}
    for who, error in errors.items():
        error = error[here]
        record = {"samples": 1, "unit": "relative", "check": f"of {few} of {CHANNELS} channels, against fp64"}
        if error[counts].isnan().any():
            record = {"failure": "wrong answer: NaN"}
        elif few:
            record |= {"median": float(error[counts].max())}
        else:
            record = {"failure": "left out: no channel counts"}
        if few < CHANNELS and math.isfinite(rest := float(error[~counts].max())):  # else none could say
            record["of_the_rest"] = rest
        if who in passes:
            took = passes[who][here]
            record |= {"most_passes": int(took.max()), "redone": int((took < 0).sum())}
        contenders[who] = record
    return {"ratios": {}, "contenders": contenders, "channels": CHANNELS, "channels_that_count": few}


def _error_bars(cell: Cell, name: str, case: dict[str, Any]) -> list[Bar]:
    few, wrong = case.get("channels_that_count"), "; ".join(wrong_answers(case))
    if few == 0:
        return []
    ours = [record["median"] for who, record in case["contenders"].items() if who != LOOP and not wrong]
    largest = max(ours, default=None)
    what = f"{cell.name}, {name}: largest relative error of any solver, {few} of {CHANNELS} channels"
    return [Bar(what, "<=", STATES, largest, unit="relative", note=wrong or case.get("skipped", ""))]


def _amplified(cell: Cell, u: Tensor, weights: list[Tensor], exact: States) -> Tensor:
    """(1, T, H): to first order, what rounding has become: the largest of some draws of signs.

    Each draw loses a unit in every state and step, upwards or downwards.
    """
    J = cell.jacobian(u.double(), [weight.double() for weight in weights], exact)
    shape = (1, exact[0].shape[1], *((2,) if cell.states > 1 else ()), exact[0].shape[-1])
    worst = torch.zeros_like(exact[0])
    for seed in range(DRAWS):
        signs = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
        off = reference.linear_recurrence(J, UNIT * signs).abs()
        worst = torch.maximum(worst, off if cell.states == 1 else off.amax(dim=2))
    return worst
