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
from benchmarks.bars import Bar, speed_bar
from benchmarks.cases import ANOTHER_MODEL, COPY, OURS
from benchmarks.cases import wrong as wrong_answers
from benchmarks.checks import state_errors
from benchmarks.harness import Contender, WrongAnswer
from benchmarks.lab import DTYPES, Job, Lab, grid, named, no_bars, share_bar
from benchmarks.peers import pararnn_torch
from benchmarks.recurrences import (
    COMPILED,
    GRADIENT,
    GRU,
    LOOP,
    LOOPED,
    LSTM,
    OF_COPY,
    OTHERS_MAY,
    OURS_MAY,
    SOLVERS,
    STATES,
    Cell,
    Layer,
    States,
    checked,
    copy,
)
from benchmarks.shapes import Sequences
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
        for priority, shape, dtype in wanted(lab):
            name = named(shape.name, "forward", dtype)
            run = partial(forward, lab, cell, shape, dtype)
            promised = shape.headline and dtype == "fp32"
            bars = partial(_bars, lab, cell, name, shape) if promised else no_bars
            facts = {"dtype": dtype}
            yield Job(cell.name, name, shape, run, bars, priority=priority, facts=facts)
        if lab.choice:
            continue
        (shape,) = lab.shapes([shapes.GPU_RECURRENCES[0] if lab.gpu else shapes.RECURRENCE])
        name = f"{shape.name}, with its input product, forward + backward"
        bars = partial(_bars_of_layer, cell, name, shape) if lab.peers else no_bars
        run, facts = partial(layer, lab, cell, shape), {"dtype": "fp32"}
        yield Job(cell.name, name, shape, run, bars, priority=3 * lab.gpu, facts=facts)
        if not lab.gpu and not lab.peers:
            for T in [min(steps, 64 * (i + 1)) for i, steps in enumerate(STEPS)] if lab.quick else STEPS:
                for s in SCALES:
                    yield _error_job(cell, s, T)


def wanted(lab: Lab) -> Iterator[tuple[int, Sequences, str]]:
    """Priority, shape and dtype of every case given pre-activations."""
    if lab.choice:
        yield from ((p, shape, dtype) for p, shape, _, dtype in grid(lab.shapes(shapes.GRID_RECURRENCES)))
    elif lab.gpu:
        headline, *others = lab.shapes(shapes.GPU_RECURRENCES)
        yield from ((1, headline, "fp32"), (3, headline, "bf16"), *((4, shape, "fp32") for shape in others))
    else:
        longer = () if lab.peers else shapes.LONG_RECURRENCES
        yield from ((0, shape, "fp32") for shape in lab.shapes([shapes.RECURRENCE, *longer]))


def _bars(lab: Lab, cell: Cell, name: str, shape: Sequences, case: dict[str, Any]) -> list[Bar]:
    where, newton = f"{cell.name}, {name} ({shape})", pararnn_torch.NEWTON
    if lab.gpu:
        return [
            share_bar(f"{where}: bytes at the rate of a copy", case, OF_COPY[True]),
            speed_bar(f"{where}: against {newton}", case, newton, OF_KERNELS),
        ]
    required = {COPY: OF_COPY[False]}
    if lab.peers:
        required |= {pararnn_torch.SEQUENTIAL: OF_SEQUENTIAL, newton: OF_NEWTON}
    return [speed_bar(f"{where}: against {who}", case, who, least) for who, least in required.items()]


def _bars_of_layer(cell: Cell, name: str, shape: Sequences, case: dict[str, Any]) -> list[Bar]:
    who = pararnn_torch.NEWTON
    return [speed_bar(f"{cell.name}, {name} ({shape}): against {who}", case, who, OF_LAYER)]


def forward(lab: Lab, cell: Cell, shape: Sequences, dtype: str) -> dict[str, Any]:
    """Given the pre-activations: what the op itself does."""
    u, weights, exact = problem(cell, shape, dtype, lab.device)
    solvers = {} if lab.peers else {"solver": SOLVERS}
    contenders = lab.ours(partial(cell.run, u, weights), checked(exact, OURS_MAY[dtype]), **solvers)
    what, few, loose = cell.work(shape, u.element_size()), min(shape.T, LOOPED), OTHERS_MAY[dtype]
    if not lab.gpu:
        contenders.append(copy(what.bytes))
    if lab.torchs:
        of_few = checked(tuple(states[:, :few] for states in exact), loose)
        loop = partial(cell.loop, u[:, :few], weights)
        contenders.append(Contender(LOOP, loop, of_few, samples=3, share=few / shape.T))
        if shape.headline and dtype == "fp32" and not lab.quick:  # compiling takes many seconds
            contenders.append(
                Contender(COMPILED, cell.compiled(u, weights), checked(exact, loose), samples=5)
            )
    if lab.libraries:
        for name, call in pararnn_torch.recurrence(cell, u, weights).items():
            if name == pararnn_torch.NEWTON or not lab.gpu:
                contenders.append(Contender(name, call, checked(exact, loose), samples=3))
    with torch.no_grad():
        return lab.measure(shape, contenders, what)


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
    check = partial(own.check, expected, GRADIENT)
    contenders = lab.ours(own.ours, check)
    if lab.torchs:
        contenders.append(Contender(LOOP, own.loop, check, samples=3))
    if lab.libraries:
        peer, loose = pararnn_torch.PararnnLayer(own), partial(own.check, expected, pararnn_torch.STATES)
        arranged = Contender(
            pararnn_torch.NEWTON, peer.run, lambda found: loose(peer.arranged(found)), samples=3
        )
        mixed = f"torch.nn.{cell.dense.__name__}"
        contenders += [arranged, Contender(mixed, dense(own), finite, samples=3)]
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
    facts = {"dtype": "fp32"}
    shape = Sequences("errors", 1, T, CHANNELS)
    return Job(
        cell.name, name, shape, partial(_error, cell, s, T), partial(_error_bars, cell, name), facts=facts
    )


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
    ours = [record for who, record in case["contenders"].items() if who != LOOP]
    largest = None if wrong or not ours else max(record["median"] for record in ours)
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
