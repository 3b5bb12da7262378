"""Times contenders fairly: checked first, then interleaved in one process, as medians with quartiles.

On a shared machine single figures drift by tens of percent between minutes, but neighbours in time drift
together. So every round runs every contender once, in an order that rotates, and two ratios are kept: that of
the medians, and the median of the ratios within each round. If they disagree the machine was not quiet.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

Clock = Callable[[Callable[[], Any]], Callable[[], float]]

MIN_ROUNDS, MAX_ROUNDS = 3, 60
MIN_SAMPLE = 1e-3  # seconds: a shorter call is repeated within one sample, so that the clock costs nothing


class WrongAnswer(Exception):  # noqa: N818 - a verdict, not a fault
    """A contender's answer differs from the reference by more than rounding explains."""


@dataclass(frozen=True)
class Contender:
    """One way to do the work.

    Attributes:
        name: what the tables call it.
        run: does the work once and returns the answer.
        check: takes the answer; returns the largest deviation found, as text, or raises :class:`WrongAnswer`.
        samples: how many rounds it takes part in, None for all (ceilings need few).
        share: what part of the work a call does, where all of it takes too long; its seconds are divided by
            that.
    """

    name: str
    run: Callable[[], Any]
    check: Callable[[Any], str]
    samples: int | None = None
    share: float = 1.0


@dataclass
class Timing:
    """Seconds a call, one for each round; or why there are none."""

    name: str
    seconds: list[float] = field(default_factory=list)
    check: str | None = None
    failure: str | None = None
    share: float = 1.0

    def summary(self) -> dict[str, Any]:
        if self.failure is not None:
            return {"failure": self.failure}
        share = {} if self.share == 1 else {"share": self.share}
        return {**summarize(self.seconds), "unit": "s", "check": self.check, **share}


def summarize(samples: Sequence[float]) -> dict[str, float | int]:
    """Median, quartiles, least and number of the samples.

    Example:
        >>> summarize([3.0, 1.0, 2.0, 4.0, 5.0])
        {'median': 3.0, 'q1': 2.0, 'q3': 4.0, 'min': 1.0, 'samples': 5}
    """
    if not samples:
        raise ValueError("summarize: samples must not be empty")
    q1, median, q3 = (
        statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
    )
    return {"median": median, "q1": q1, "q3": q3, "min": min(samples), "samples": len(samples)}


def ratios(ours: Timing, other: Timing) -> dict[str, float]:
    """How many times as fast as ``other`` we are: the ratio of medians, median and quartiles by round.

    Example:
        >>> ratios(Timing("a", [1.0, 1.0, 2.0]), Timing("b", [2.0, 3.0, 4.0]))["of_medians"]
        3.0
    """
    by_round = summarize([b / a for a, b in zip(ours.seconds, other.seconds, strict=False)])
    return {
        "of_medians": statistics.median(other.seconds) / statistics.median(ours.seconds),
        "by_round": by_round["median"],
        "by_round_q1": by_round["q1"],
        "by_round_q3": by_round["q3"],
    }


def wall_clock(run: Callable[[], Any]) -> Callable[[], float]:
    """What takes one sample of ``run``: seconds a call by the wall."""
    return partial(_sample, run, _repeats(run))


def measure(
    contenders: Sequence[Contender],
    *,
    seconds: float,
    min_rounds: int = MIN_ROUNDS,
    clock: Clock = wall_clock,
    until: float = math.inf,
) -> dict[str, Timing]:
    """Check every contender, then time those that passed in interleaved rounds.

    Args:
        contenders: their names must differ.
        seconds: rounds go on until this much time is used, ``MAX_ROUNDS`` at most.
        min_rounds: at least this many rounds.
        clock: makes of a contender's ``run`` what takes one sample of it, in seconds a call.
        until: when to stop, by ``time.monotonic()``: a contender whose turn comes later is left out.

    Returns:
        By name: the timings, or the failure of a contender whose answer was wrong or that could not run. A
        failed contender is never timed.

    Raises:
        ValueError: two contenders share a name.
    """
    names = [contender.name for contender in contenders]
    if len(set(names)) != len(names):
        raise ValueError(f"measure: contenders must have different names, got {names}")
    timings = {contender.name: Timing(contender.name, share=contender.share) for contender in contenders}
    entrants = [contender for contender in contenders if _admit(contender, timings[contender.name], until)]
    samplers = {contender.name: clock(contender.run) for contender in entrants}
    start, rounds = time.perf_counter(), 0
    while entrants and rounds < MAX_ROUNDS and (rounds < min_rounds or time.perf_counter() - start < seconds):
        if rounds and time.monotonic() > until:
            break
        shift = rounds % len(entrants)
        for contender in entrants[shift:] + entrants[:shift]:
            if contender.samples is None or rounds < contender.samples:
                timings[contender.name].seconds.append(samplers[contender.name]() / contender.share)
        rounds += 1
    return timings


def _admit(contender: Contender, timing: Timing, until: float) -> bool:
    """Run once, untimed (which also warms up), and check the answer."""
    if time.monotonic() > until:
        timing.failure = "left out: the time was up"
        return False
    try:
        timing.check = contender.check(contender.run())
    except WrongAnswer as error:
        timing.failure = f"wrong answer: {error}"
    except Exception as error:  # a peer's fault must not end the run: it is reported in place of its figure
        timing.failure = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
    return timing.failure is None


def _repeats(run: Callable[[], Any]) -> int:
    """How many calls make a sample long enough for the clock."""
    repeats = 1
    while (elapsed := _sample(run, repeats) * repeats) < MIN_SAMPLE:
        repeats = max(repeats + 1, min(repeats * 10, int(repeats * 1.5 * MIN_SAMPLE / max(elapsed, 1e-7))))
    return repeats


def _sample(run: Callable[[], Any], repeats: int) -> float:
    """Seconds a call over ``repeats`` calls, the garbage collector held off."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats
    finally:
        if collecting:
            gc.enable()
