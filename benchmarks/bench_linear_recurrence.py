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
from benchmarks.bars import Bar, speed_bar
from benchmarks.cases import COPY
from benchmarks.ceilings import Work
from benchmarks.checks import close
from benchmarks.harness import Contender
from benchmarks.lab import DTYPES, Job, Lab, grid, named, no_bars, share_bar
from benchmarks.recurrences import (
    GRADIENT,
    LOOP,
    LOOPED,
    OF_COPY,
    OTHERS_MAY,
    OURS_MAY,
    checked,
    copy,
    differentiated,
)
from benchmarks.shapes import Sequences
from fastsparse import reference
from fastsparse.reference.linear_recurrence import multiply, scan

SCAN, LOGARITHMS = "torch scan", "torch, logcumsumexp"
LOG_ROUNDING = 1e-2  # relative


def jobs(lab: Lab) -> Iterator[Job]:
    if lab.peers:
        return
    for priority, shape, dtype, pairs in wanted(lab):
        name = named(shape.name, "pairs" if pairs else "single channels", dtype, "forward")
        run = partial(forward, lab, shape, dtype, pairs)
        promised = shape.headline and dtype == "fp32"
        bars = partial(_bars, lab, name, shape) if promised else no_bars
        facts = {"dtype": dtype}
        yield Job("linear_recurrence", name, shape, run, bars, priority=priority, facts=facts)
    if not lab.gpu:
        (shape,) = lab.shapes([shapes.RECURRENCE])
        name = f"{shape.name}, single channels, forward + backward"
        run, bars = partial(_backward, lab, shape), partial(_bars, lab, name, shape)
        yield Job("linear_recurrence", name, shape, run, bars, facts={"dtype": "fp32"})


def wanted(lab: Lab) -> Iterator[tuple[int, Sequences, str, bool]]:
    """Priority, shape, dtype, and whether of pairs."""
    if lab.choice:
        yield from (
            (p, shape, dtype, False) for p, shape, _, dtype in grid(lab.shapes(shapes.GRID_RECURRENCES))
        )
    elif lab.gpu:
        headline, *others = lab.shapes(shapes.GPU_RECURRENCES)
        yield from ((2, headline, "fp32", False), (3, headline, "bf16", False), (4, headline, "fp32", True))
        yield from ((5, shape, "fp32", False) for shape in others)
    else:
        (headline,) = lab.shapes([shapes.RECURRENCE])
        yield from ((0, headline, "fp32", pairs) for pairs in (False, True))
        yield from ((0, shape, "fp32", False) for shape in lab.shapes(shapes.LONG_RECURRENCES))


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


def forward(lab: Lab, shape: Sequences, dtype: str, pairs: bool) -> dict[str, Any]:
    a, b, exact = problem(shape, dtype, pairs, lab.device)
    contenders = lab.ours(lambda: fastsparse.linear_recurrence(a, b), _judge(exact, OURS_MAY[dtype]))
    what, few, loose = work(shape, pairs, a.element_size()), min(shape.T, LOOPED), OTHERS_MAY[dtype]
    if not lab.gpu:
        contenders.append(copy(what.bytes))
    if not lab.choice:
        part, right = partial(loop, a[:, :few], b[:, :few]), _judge(exact[:, :few], loose)
        contenders.append(Contender(LOOP, part, right, samples=3, share=few / shape.T))
    if not lab.choice and dtype == "fp32" and (lab.gpu or shape.headline):
        contenders.append(Contender(SCAN, partial(scan, a, b), _judge(exact, loose), samples=3))
        if not pairs:
            right = _judge(exact, LOG_ROUNDING)
            contenders.append(Contender(LOGARITHMS, partial(logarithms, a, b), right, samples=3))
    with torch.no_grad():
        return lab.measure(shape, contenders, what)


def _backward(lab: Lab, shape: Sequences) -> dict[str, Any]:
    """Forward and the gradients of factors and terms."""
    a, b = (part.requires_grad_() for part in inputs(shape))
    upstream = data.normal(shape.B * shape.T, shape.H, 72).view_as(b)
    double = [part.detach().double().requires_grad_() for part in (a, b)]
    exact = differentiated(lambda a: loop(a, double[1]), double[0], double[1:], upstream.double())
    check = checked(tuple(exact[:1]), GRADIENT)

    def check_all(found: list[Tensor]) -> str:
        verdicts = [check(tuple(found[:1]))]
        for name, got, right in zip(("d_a", "d_b"), found[1:], exact[1:], strict=True):
            verdicts.append(close(name, got, right.float(), GRADIENT))
        return ", ".join(verdicts)

    def call(op: Any) -> list[Tensor]:
        return differentiated(lambda a: op(a, b), a, (b,), upstream)

    # Beyond the forward's 3 numbers an element: read a, h and what comes back; write both gradients.
    what = Work(work(shape).bytes * 8 / 3, work(shape).flops * 3)
    contenders = [
        *lab.ours(lambda: call(fastsparse.linear_recurrence), check_all),
        copy(what.bytes),
        Contender(LOOP, partial(call, loop), check_all, samples=3),
        Contender(SCAN, partial(call, scan), check_all, samples=3),
    ]
    return lab.measure(shape, contenders, what)


def _judge(exact: Tensor, tolerance: float) -> Callable[[Tensor], str]:
    check = checked(as_states(exact), tolerance)
    return lambda h: check(as_states(h))


def as_states(h: Tensor) -> tuple[Tensor, ...]:
    """Single channels as they are; of pairs each state by itself."""
    return (h,) if h.dim() == 3 else h.unbind(2)


def _bars(lab: Lab, name: str, shape: Sequences, case: dict[str, Any]) -> list[Bar]:
    where = f"linear_recurrence, {name} ({shape})"
    if lab.gpu:
        return [share_bar(f"{where}: bytes at the rate of a copy", case, OF_COPY[True])]
    return [speed_bar(f"{where}: against {COPY}", case, COPY, OF_COPY[False])]
