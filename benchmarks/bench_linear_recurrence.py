"""``linear_recurrence``, of single channels and of pairs: against a copy of its bytes, a loop over time in
Python, a scan of log2(T) passes in PyTorch, and sums of logarithms.

The last are for positive factors and terms (Heinsen 2023, arXiv 2311.06281), as they are here, and carry the
rounding of a sum of T logarithms.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import fastsparse
from benchmarks import data, shapes
from benchmarks.ceilings import Work
from benchmarks.checks import close_all
from benchmarks.harness import Contender
from benchmarks.lab import DTYPES, Job, Lab
from benchmarks.recurrences import (
    GRADIENT,
    LOOP,
    OTHERS_MAY,
    checked,
    copy,
    copy_bars,
    differentiated,
    forward,
)
from benchmarks.shapes import Given, Sequences, grid
from fastsparse import reference
from fastsparse.reference.linear_recurrence import multiply, scan

SCAN, LOGARITHMS = "torch scan", "torch, logcumsumexp"
LOG_ROUNDING = 1e-2  # relative


def jobs(lab: Lab) -> Iterator[Job]:
    if lab.peers:
        return
    for given, pairs in wanted(lab):
        name = given.name(f"{'pairs' if pairs else 'single channels'}, forward")
        promised = given.shape.headline and given.dtype == "fp32"
        yield _job(lab, name, given, partial(case, lab, given, pairs), promised)
    if not lab.gpu:
        given = Given(*lab.shapes([shapes.RECURRENCE]))
        name = given.name("single channels, forward + backward")
        yield _job(lab, name, given, partial(_backward, lab, given.shape), True)


def _job(lab: Lab, name: str, given: Given, run: Callable[[], dict[str, Any]], promised: bool) -> Job:
    where = f"linear_recurrence, {name} ({given.shape})"
    return Job("linear_recurrence", name, given, run, partial(copy_bars, lab.gpu, where, promised))


def wanted(lab: Lab) -> Iterator[tuple[Given, bool]]:
    """Every case, and whether of pairs."""
    if lab.choice:
        yield from ((given, False) for given in grid(lab.shapes(shapes.GRID_RECURRENCES), kinds=[""]))
    elif lab.gpu:
        headline, *others = lab.shapes(shapes.GPU_RECURRENCES)
        yield Given(headline, priority=2), False
        yield Given(headline, "bf16", priority=3), False
        yield Given(headline, priority=4), True
        yield from ((Given(shape, priority=5), False) for shape in others)
    else:
        headline, *others = lab.shapes([shapes.RECURRENCE, *shapes.LONG_RECURRENCES])
        yield from ((Given(headline), pairs) for pairs in (False, True))
        yield from ((Given(shape), False) for shape in others)


def inputs(shape: Sequences, pairs: bool = False) -> tuple[Tensor, Tensor]:
    """Factors and terms of slow gates: a in (0.5, 1), b positive; blocks that shrink by as much."""
    B, T, H = shape.B, shape.T, shape.H
    rows = (B, T, 2, H) if pairs else (B, T, H)
    b = data.normal(B * T, b_width := H * (2 if pairs else 1), 71).abs_().view(rows)
    if not pairs:
        return 0.5 + 0.5 * torch.sigmoid(2 + data.normal(B * T, b_width, 70)).view(rows), b
    blocks = data.normal(B * T, 4 * H, 70).view(B, T, 2, 2, H)
    return 0.9 * blocks / blocks.abs().sum(3, keepdim=True), b  # rows' absolute sums are 0.9


@lru_cache(maxsize=1)
def problem(shape: Sequences, dtype: str, pairs: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Factors, terms, and the states in fp64."""
    a, b = (part.to(device, DTYPES[dtype]) for part in inputs(shape, pairs))
    return a, b, reference.linear_recurrence(a.double(), b.double())


def work(shape: Sequences, pairs: bool = False, itemsize: int = 4) -> Work:
    """Factors and terms read, states written."""
    steps, per_step = shape.B * shape.T * shape.H, 8 if pairs else 3
    return Work(float(itemsize * per_step * steps), float((8 if pairs else 2) * steps))


def loop(a: Tensor, b: Tensor) -> Tensor:
    """A loop over time in Python."""
    h, states = torch.zeros_like(b[:, 0]), []
    for factor, term in zip(a.unbind(1), b.unbind(1), strict=True):
        h = multiply(factor, h) + term
        states.append(h)
    return torch.stack(states, dim=1)


def logarithms(a: Tensor, b: Tensor) -> Tensor:
    """h = exp(A) * cumsum(b * exp(-A)), A being the sums of log(a), with neither ever formed."""
    log_a = a.log().cumsum(dim=1)
    return torch.exp(log_a + torch.logcumsumexp(b.log() - log_a, dim=1))


def case(lab: Lab, given: Given, pairs: bool) -> dict[str, Any]:
    shape = given.shape
    a, b, exact = problem(shape, given.dtype, pairs, lab.device)
    others = []
    if not lab.choice and given.dtype == "fp32" and (lab.gpu or shape.headline):
        right = checked((exact,), OTHERS_MAY[given.dtype])
        others.append(Contender(SCAN, partial(scan, a, b), right, samples=3))
        if not pairs:
            right = checked((exact,), LOG_ROUNDING)
            others.append(Contender(LOGARITHMS, partial(logarithms, a, b), right, samples=3))
    run, what = partial(fastsparse.linear_recurrence, a, b), work(shape, pairs, a.element_size())
    return forward(lab, given, run, lambda few: loop(a[:, :few], b[:, :few]), (exact,), what, others)


def _backward(lab: Lab, shape: Sequences) -> dict[str, Any]:
    """Forward and the gradients of factors and terms."""
    a, b = (part.requires_grad_() for part in inputs(shape))
    upstream = data.normal(shape.B * shape.T, shape.H, 72).view_as(b)
    double = [part.detach().double().requires_grad_() for part in (a, b)]
    h, *gradients = differentiated(lambda a: loop(a, double[1]), double[0], double[1:], upstream.double())
    expected = dict(zip(("d_a", "d_b"), gradients, strict=True))

    def check(found: list[Tensor]) -> str:
        return f"{checked((h,), GRADIENT)(found[0])}, {close_all(expected, GRADIENT, found[1:])}"

    def call(op: Any) -> list[Tensor]:
        return differentiated(lambda a: op(a, b), a, (b,), upstream)

    # Beyond the forward's 3 numbers an element: read a, h and what comes back; write both gradients.
    what = Work(work(shape).bytes * 8 / 3, work(shape).flops * 3)
    contenders = [
        *lab.ours(partial(call, fastsparse.linear_recurrence), check),
        copy(what.bytes),
        Contender(LOOP, partial(call, loop), check, samples=3),
        Contender(SCAN, partial(call, scan), check, samples=3),
    ]
    return lab.measure(shape, contenders, what)
