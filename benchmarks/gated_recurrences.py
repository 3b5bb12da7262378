"""The cases of ``gru_recurrence`` and ``lstm_recurrence``: given pre-activations, as a layer, and the errors.

Against a copy of as many bytes, which nothing can beat that reads its inputs from memory, a loop over time in
Python, and one whose body is compiled; (peers) pararnn-torch and PyTorch's own layer, whose recurrence mixes
all channels: another model, of as many inputs and channels.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.bars import Bar, speed_bar
from benchmarks.cases import ANOTHER_MODEL, COPY, OURS, Options, describe, run_case
from benchmarks.cases import wrong as wrong_answers
from benchmarks.checks import state_errors
from benchmarks.harness import Contender, WrongAnswer
from benchmarks.recurrences import (
    COMPILED,
    GRADIENT,
    LOOP,
    SOLVERS,
    STATES,
    Cell,
    Layer,
    States,
    backend_of,
    checked,
    copy,
)
from benchmarks.shapes import Sequences
from fastsparse import reference

OF_COPY = 0.5  # its time in ours: we may take twice as long
OF_SEQUENTIAL, OF_NEWTON, OF_LAYER = 25.0, 80.0, 6.0  # how many times as fast as pararnn-torch
SCALES = (0.03, 0.1, 0.5, 1.0, 2.0, 4.0)  # of normal recurrent weights
STEPS = (1024, 65536)
CHANNELS = 16  # of every scale
UNIT = torch.finfo(torch.float32).eps  # in the last place of a state near 1
DRAWS = 4
Found = tuple[dict[str, Any], list[Bar]]


def run(cell: Cell, options: Options) -> Iterator[Found]:
    (shape,) = options.shapes([shapes.RECURRENCE])
    yield _forward(cell, shape, options)
    yield _layer(cell, shape, options)
    if not options.peers:
        for other in options.shapes(shapes.LONG_RECURRENCES):
            yield _forward(cell, other, options)
        yield from _errors(cell, options)


def _forward(cell: Cell, shape: Sequences, options: Options) -> Found:
    """Given the pre-activations: what the op itself does."""
    u, weights = cell.problem(shape)
    exact = cell.exact(u, weights)
    check = checked(exact)
    contenders = [Contender(OURS, partial(cell.run, u, weights), check), copy(cell.bytes(shape))]
    required = {COPY: OF_COPY} if shape.headline else {}
    if options.peers:
        from benchmarks.peers import pararnn_torch

        loose = checked(exact, pararnn_torch.STATES)
        for name, call in pararnn_torch.recurrence(cell, u, weights).items():
            contenders.append(Contender(name, call, loose, samples=3))
        required |= {pararnn_torch.SEQUENTIAL: OF_SEQUENTIAL, pararnn_torch.NEWTON: OF_NEWTON}
    else:
        contenders += [
            Contender(f"{OURS}, {solver}", partial(cell.run, u, weights, solver), check, samples=3)
            for solver in SOLVERS
        ]
        few = max(1, min(shape.T, 1024))  # steps of the loop, each of which costs the same
        part = u[:, :few]
        of_part = checked(tuple(states[:, :few] for states in exact))
        share = few / shape.T
        contenders.append(Contender(LOOP, partial(cell.loop, part, weights), of_part, samples=3, share=share))
        if shape.headline:
            contenders.append(Contender(COMPILED, cell.compiled(u, weights), check, samples=5))
    name = f"{shape.name}, forward"
    with torch.no_grad():
        case = run_case(name, shape, contenders, options, work=cell.work(shape), **_facts(cell))
    return case, [_bar(cell, name, shape, case, who, least) for who, least in required.items()]


def _layer(cell: Cell, shape: Sequences, options: Options) -> Found:
    """Input product, recurrence, and the gradients of the inputs and of all weights."""
    layer = Layer(cell, shape)
    expected = layer.expected()
    check = partial(layer.check, expected, GRADIENT)
    contenders = [Contender(OURS, layer.ours, check)]
    required = {}
    if options.peers:
        from benchmarks.peers import pararnn_torch

        peer = pararnn_torch.PararnnLayer(layer)
        loose = partial(layer.check, expected, pararnn_torch.STATES)
        judged = Contender(
            pararnn_torch.NEWTON, peer.run, lambda found: loose(peer.arranged(found)), samples=3
        )
        contenders += [
            judged,
            Contender(f"torch.nn.{cell.dense.__name__}", dense(layer), finite, samples=3),
        ]
        required = {pararnn_torch.NEWTON: OF_LAYER}
    else:
        contenders.append(Contender(LOOP, layer.loop, check, samples=3))
    name = f"{shape.name}, with its input product, forward + backward"
    case = run_case(name, shape, contenders, options, **_facts(cell))
    return case, [_bar(cell, name, shape, case, who, least) for who, least in required.items()]


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


def _errors(cell: Cell, options: Options) -> Iterator[Found]:
    """What fp32 is off by, for weights of every scale and all solvers, beside a plain loop in fp32.

    A channel counts where a unit in the last place, lost in every step, upwards or downwards, and carried
    along by the exact recurrence, comes to no more than the tolerance. The others amplify rounding by more,
    in chaos without end: no arithmetic in fp32 can follow these, as the plain loop's own error shows, which
    stands beside ours.
    """
    lengths = [min(steps, 64 * (i + 1)) for i, steps in enumerate(STEPS)] if options.quick else STEPS
    shape = Sequences("errors", 1, lengths[-1], CHANNELS * len(SCALES))
    scale = torch.tensor(SCALES).repeat_interleave(CHANNELS)
    u, weights = cell.problem(shape, 1.0)
    weights = [weight * scale for weight in weights]
    exact = cell.exact(u, weights)
    with torch.no_grad():
        plain = cell.loop(u, weights)
        loss = _amplified(cell, u, weights, exact)
    for T in lengths:
        part = u[:, :T]
        answers, passes = {LOOP: plain}, {}
        for solver in SOLVERS:
            with torch.no_grad():
                answers[f"{OURS}, {solver}"], took = cell.solved(part, weights, solver)
            passes[f"{OURS}, {solver}"] = took[0]
        errors = {
            who: torch.stack(
                [state_errors(got[:, :T], right[:, :T])[0] for got, right in zip(states, exact, strict=True)]
            ).amax(dim=0)
            for who, states in answers.items()
        }
        largest = torch.stack([right[0, :T].abs().amax(dim=0) for right in exact]).amin(dim=0)
        lost = loss[0, :T].amax(dim=0) / largest
        for s in SCALES:
            here = scale == s
            case, bars = _error(cell, s, T, {who: error[here] for who, error in errors.items()}, lost[here])
            for who, took in passes.items():
                case["contenders"][who] |= {
                    "most_passes": int(took[here].max()), "redone": int((took[here] < 0).sum()),
                }  # fmt: skip
            yield case, bars


def _error(cell: Cell, s: float, T: int, errors: dict[str, Tensor], lost: Tensor) -> Found:
    """One scale: the largest errors of channels that count, and of those that amplify rounding too much."""
    counts = lost <= STATES
    few, all_ = int(counts.sum()), len(counts)
    case = describe(
        f"error, weights of scale {s:g}, T={T}", Sequences("errors", 1, T, CHANNELS), **_facts(cell)
    )
    case |= {"ratios": {}, "contenders": {}, "channels": all_, "channels_that_count": few}
    largest = []
    for who, error in errors.items():
        record = {
            "samples": 1,
            "unit": "relative",
            "check": f"of {few} of {all_} channels, against fp64",
        }
        if error[counts].isnan().any():
            record = {"failure": "wrong answer: NaN"}
        elif few:
            record |= {"median": float(error[counts].max())}
        else:
            record = {"failure": "left out: no channel counts"}
        if few < all_:
            rest = float(error[~counts].max())
            if math.isfinite(rest):  # else nobody could say how far off it is
                record["of_the_rest"] = rest
        case["contenders"][who] = record
        largest += [record.get("median", math.inf)] if who != LOOP else []
    name = f"{cell.name}, {case['name']}: largest relative error of any solver, {few} of {all_} channels"
    wrong = "; ".join(wrong_answers(case))
    bar = Bar(name, "<=", STATES, None if wrong else max(largest), unit="relative", note=wrong)
    return case, [bar] if few else []


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


def _facts(cell: Cell) -> dict[str, str]:
    return {"dtype": "fp32", "backend": backend_of(cell.name)}


def _bar(cell: Cell, name: str, shape: Sequences, case: dict[str, Any], who: str, least: float) -> Bar:
    return speed_bar(f"{cell.name}, {name} ({shape}): against {who}", case, who, least)
