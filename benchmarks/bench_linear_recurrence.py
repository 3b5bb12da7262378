"""``linear_recurrence``, of single channels and of pairs: against a copy of its bytes, a loop over time in
Python, a scan of log2(T) passes in PyTorch, and sums of logarithms.

The last are for positive factors and terms (Heinsen 2023, arXiv 2311.06281), as they are here, and carry the
rounding of a sum of T logarithms.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastsparse
from benchmarks import data, shapes
from benchmarks.bars import Bar, speed_bar
from benchmarks.cases import COPY, OURS, Options, run_case
from benchmarks.ceilings import Work
from benchmarks.checks import close
from benchmarks.harness import Contender
from benchmarks.recurrences import GRADIENT, LOOP, backend_of, checked, copy, differentiated
from benchmarks.shapes import Sequences
from fastsparse import reference
from fastsparse.reference.linear_recurrence import multiply, scan

OF_COPY = 0.5  # its time in ours: we may take twice as long
SCAN, LOGARITHMS = "torch scan", "torch, logcumsumexp"
LOG_ROUNDING = 1e-2  # relative
LOOPED = 1024  # steps of the loop, each of which costs the same


def run(options: Options) -> Iterator[tuple[dict[str, Any], list[Bar]]]:
    if options.peers:
        return
    (headline,) = options.shapes([shapes.RECURRENCE])
    yield _forward(headline, options)
    yield _forward(headline, options, pairs=True)
    yield _backward(headline, options)
    for shape in options.shapes(shapes.LONG_RECURRENCES):
        yield _forward(shape, options)


def problem(shape: Sequences, pairs: bool = False) -> tuple[Tensor, Tensor]:
    """Factors and terms of slow gates: a in (0.5, 1), b positive; blocks that shrink by as much."""
    B, T, H = shape.B, shape.T, shape.H
    rows = (B, T, 2, H) if pairs else (B, T, H)
    b = data.normal(B * T, b_width := H * (2 if pairs else 1), 71).abs_().view(rows)
    if not pairs:
        return 0.5 + 0.5 * torch.sigmoid(2 + data.normal(B * T, b_width, 70)).view(rows), b
    blocks = data.normal(B * T, 4 * H, 70).view(B, T, 2, 2, H)
    return 0.9 * blocks / blocks.abs().sum(3, keepdim=True), b  # rows' absolute sums are 0.9


def work(shape: Sequences, pairs: bool = False, itemsize: int = 4) -> Work:
    """Factors and terms read, states written."""
    steps, per_step = shape.B * shape.T * shape.H, 8 if pairs else 3
    return Work(float((8 if pairs else 2) * steps), float(itemsize * per_step * steps))


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


def _forward(shape: Sequences, options: Options, pairs: bool = False) -> tuple[dict[str, Any], list[Bar]]:
    a, b = problem(shape, pairs)
    exact = reference.linear_recurrence(a.double(), b.double())
    what = work(shape, pairs)

    def contender(name: str, call: Any, right: Tensor = exact, may: float | None = None, **rest: Any):
        check = checked(as_states(right), *(() if may is None else (may,)))
        return Contender(name, call, lambda h: check(as_states(h)), **rest)

    few = min(shape.T, LOOPED)
    contenders = [
        contender(OURS, partial(fastsparse.linear_recurrence, a, b)),
        copy(what.bytes),
        contender(
            LOOP, partial(loop, a[:, :few], b[:, :few]), exact[:, :few], samples=3, share=few / shape.T
        ),
    ]
    if shape.headline:
        contenders.append(contender(SCAN, partial(scan, a, b), samples=3))
    if shape.headline and not pairs:
        contenders.append(contender(LOGARITHMS, partial(logarithms, a, b), may=LOG_ROUNDING, samples=3))
    name = f"{shape.name}, {'pairs' if pairs else 'single channels'}, forward"
    with torch.no_grad():
        case = run_case(
            name, shape, contenders, options, work=what, dtype="fp32", backend=backend_of("linear_recurrence")
        )
    return case, [_bar(name, shape, case)] if shape.headline else []


def _backward(shape: Sequences, options: Options) -> tuple[dict[str, Any], list[Bar]]:
    """Forward and the gradients of factors and terms."""
    a, b = (part.requires_grad_() for part in problem(shape))
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

    contenders = [
        Contender(OURS, partial(call, fastsparse.linear_recurrence), check_all),
        copy(work(shape).bytes * 8 / 3),
        Contender(LOOP, partial(call, loop), check_all, samples=3),
        Contender(SCAN, partial(call, scan), check_all, samples=3),
    ]
    # Beyond the forward's 3 numbers an element: read a, h and what comes back; write both gradients.
    what = Work(work(shape).flops * 3, work(shape).bytes * 8 / 3)
    name = f"{shape.name}, single channels, forward + backward"
    case = run_case(
        name, shape, contenders, options, work=what, dtype="fp32", backend=backend_of("linear_recurrence")
    )
    return case, [_bar(name, shape, case)]


def as_states(h: Tensor) -> tuple[Tensor, ...]:
    """Single channels as they are; of pairs each state by itself."""
    return (h,) if h.dim() == 3 else h.unbind(2)


def _bar(name: str, shape: Sequences, case: dict[str, Any]) -> Bar:
    return speed_bar(f"linear_recurrence, {name} ({shape}): against {COPY}", case, COPY, OF_COPY)
