"""``gru_recurrence`` against the number of steps: by every solver, as it is, and by a loop in Python.

One sequence: with more of them, or more channels, there is less to gain by running time in parallel.

Forward alone, and forward and backward; of few channels, and of many. A contender whose call takes long is
left out at greater lengths.
"""

import math
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import OURS, figures
from benchmarks.checks import close_all, close_states
from benchmarks.harness import Contender, Timing, measure
from benchmarks.lab import Job, Lab, skipped
from benchmarks.recurrences import GRADIENT, GRU, LOOP, SOLVERS, STATES, differentiated
from benchmarks.shapes import Given, Sequences
from fastsparse import reference

LENGTHS = tuple(2**i for i in (6, 8, 10, 12, 14, 16, 17))
CHANNELS = (8, 128)
LONGEST_LOOP = 4096
SHARE = 0.15  # of a case's usual time
SLOW = 1.0  # seconds a call
DEADLINE = 45.0  # seconds for all of a width
FORWARD, BACKWARD = "forward", "forward + backward"


def jobs(lab: Lab) -> Iterator[Job]:
    if lab.gpu or lab.peers:
        return
    lengths = LENGTHS[:2] if lab.quick else LENGTHS
    for H in CHANNELS:
        series = _Series(lab, H, lengths[-1])
        for T, what in product(lengths, (FORWARD, BACKWARD)):
            given, facts = Given(Sequences("lengths", 1, T, H)), {"series": f"H={H}, {what}"}
            run = partial(series.case, T, what)
            yield Job("recurrence_length", f"{given.shape}, {what}", given, run, facts=facts)


class _Series:
    """Cases of ever greater lengths, which remember who was slow."""

    def __init__(self, lab: Lab, H: int, longest: int) -> None:
        self.lab, self.shape = lab, Sequences("lengths", 1, longest, H)
        self.slow: set[tuple[str, str]] = set()
        self.until = math.inf

    @cached_property
    def problem(self) -> tuple[Tensor, list[Tensor], Tensor]:
        """Pre-activations, weights, and the states in fp64."""
        self.until = time.monotonic() + DEADLINE
        u, weights = GRU.problem(self.shape)
        return u, weights, GRU.exact(u, weights)[0]

    def case(self, T: int, what: str) -> dict[str, Any]:
        u, weights, exact = self.problem
        u, exact = u[:, :T], exact[:, :T]
        calls: dict[str, Callable[..., Any]] = {OURS: GRU.run} | {
            f"{OURS}, {solver}": partial(GRU.run, solver=solver) for solver in SOLVERS
        }
        calls |= {LOOP: GRU.loop} if T <= LONGEST_LOOP else {}
        calls = {who: call for who, call in calls.items() if (what, who) not in self.slow}
        if not calls:
            return skipped("all were too slow, or failed, at fewer steps")
        upstream = torch.ones_like(exact, dtype=torch.float32)
        gradients = _exact(u, weights, exact, upstream) if what == BACKWARD else {}

        def run(call: Callable[..., Any]) -> list[Tensor]:
            if what == FORWARD:
                with torch.no_grad():
                    return [call(u, weights)[0]]
            leaves = [part.detach().requires_grad_() for part in (u, *weights)]
            return differentiated(lambda u: call(u, leaves[1:])[0], leaves[0], leaves[1:], upstream)

        def check(found: list[Tensor]) -> str:
            verdict = close_states("h", found[0], exact, STATES)
            return ", ".join(filter(None, (verdict, close_all(gradients, GRADIENT, found[1:]))))

        contenders = [Contender(who, partial(run, call), check) for who, call in calls.items()]
        seconds = 0.0 if self.lab.quick else SHARE * self.lab.seconds
        timings = measure(contenders, seconds=seconds, min_rounds=2, until=self.until)
        self.slow |= {(what, who) for who, timing in timings.items() if _slow(timing)}
        return figures(timings, self.lab.ceilings)


def _slow(timing: Timing) -> bool:
    return timing.failure is not None or min(timing.seconds, default=0.0) > SLOW


def _exact(u: Tensor, weights: list[Tensor], h: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """The gradients of u and the weights in fp64."""
    double = u.double(), *(weight.double() for weight in weights)
    gradients = reference.gru_recurrence_backward(
        *double, None, None, h, upstream.double(), True, True, False
    )
    return {"d_u": gradients[0], "d_weight": gradients[1]}
