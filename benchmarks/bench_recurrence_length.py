"""``gru_recurrence`` against the number of steps: by every solver, as it is, and by a loop in Python.

One sequence: with more of them, or more channels, there is less to gain by running time in parallel.

Forward alone, and forward and backward; of few channels, and of many. A contender whose call takes long is
left out at greater lengths.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.bars import Bar
from benchmarks.cases import OURS, Options, describe, figures, skipped
from benchmarks.checks import close, close_states
from benchmarks.harness import Contender, Timing, measure
from benchmarks.recurrences import GRADIENT, GRU, LOOP, SOLVERS, STATES, backend_of, differentiated
from benchmarks.shapes import Sequences
from fastsparse import reference

LENGTHS = tuple(2**i for i in (6, 8, 10, 12, 14, 16, 17))
CHANNELS = (8, 128)
LONGEST_LOOP = 4096
SHARE = 0.15  # of a case's usual time
SLOW = 1.0  # seconds a call
DEADLINE = 90.0  # seconds for all
FORWARD, BACKWARD = "forward", "forward + backward"


def run(options: Options) -> Iterator[tuple[dict[str, Any], list[Bar]]]:
    if options.peers:
        return
    until = time.monotonic() + DEADLINE
    lengths = LENGTHS[:2] if options.quick else LENGTHS
    for H in CHANNELS:
        u, weights = GRU.problem(Sequences("lengths", 1, lengths[-1], H))
        h = GRU.exact(u, weights)[0]
        slow: set[tuple[str, str]] = set()
        for T in lengths:
            for what in (FORWARD, BACKWARD):
                yield _case(u[:, :T], weights, h[:, :T], what, slow, until, options), []


def _case(
    u: Tensor, weights: list[Tensor], exact: Tensor, what: str, slow: set, until: float, options: Options
) -> dict[str, Any]:
    T, H = exact.shape[1:]
    shape = Sequences("lengths", 1, T, H)
    solve, check = (_forward, _check_states) if what == FORWARD else (_differentiated, _check_all)
    calls: dict[str, Callable[..., Any]] = {OURS: GRU.run} | {
        f"{OURS}, {solver}": partial(GRU.run, solver=solver) for solver in SOLVERS
    }
    calls |= {LOOP: GRU.loop} if T <= LONGEST_LOOP else {}
    calls = {who: call for who, call in calls.items() if (what, who) not in slow}
    facts = {"dtype": "fp32", "backend": backend_of(GRU.name), "series": f"H={H}, {what}"}
    if not calls:
        return skipped(f"{shape}, {what}", shape, "all were too slow, or failed, at fewer steps", **facts)
    upstream = torch.ones_like(exact, dtype=torch.float32)
    right = _exact(u, weights, exact, upstream) if what == BACKWARD else [exact]
    contenders = [
        Contender(who, partial(solve, call, u, weights, upstream), partial(check, right))
        for who, call in calls.items()
    ]
    seconds = 0.0 if options.quick else SHARE * options.seconds
    timings = measure(contenders, seconds=seconds, min_rounds=2, until=until)
    slow |= {(what, who) for who, timing in timings.items() if _slow(timing)}
    return describe(f"{shape}, {what}", shape, **facts) | figures(timings)


def _slow(timing: Timing) -> bool:
    return timing.failure is not None or min(timing.seconds, default=0.0) > SLOW


def _forward(call: Callable[..., Any], u: Tensor, weights: list[Tensor], upstream: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [call(u, weights)[0]]


def _differentiated(
    call: Callable[..., Any], u: Tensor, weights: list[Tensor], upstream: Tensor
) -> list[Tensor]:
    leaves = [part.detach().requires_grad_() for part in (u, *weights)]
    return differentiated(lambda u: call(u, leaves[1:])[0], leaves[0], leaves[1:], upstream)


def _exact(u: Tensor, weights: list[Tensor], h: Tensor, upstream: Tensor) -> list[Tensor]:
    """h and the gradients of u and the weights in fp64."""
    double = u.double(), *(weight.double() for weight in weights)
    gradients = reference.gru_recurrence_backward(
        *double, None, None, h, upstream.double(), True, True, False
    )
    return [h, *gradients[:2]]


def _check_states(right: list[Tensor], found: list[Tensor]) -> str:
    return close_states("h", found[0], right[0], STATES)


def _check_all(right: list[Tensor], found: list[Tensor]) -> str:
    verdicts = [_check_states(right, found)]
    for name, got, gradient in zip(("d_u", "d_weight"), found[1:], right[1:], strict=True):
        verdicts.append(close(name, got, gradient.float(), GRADIENT))
    return ", ".join(verdicts)
