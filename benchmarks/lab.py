"""What a measurement is made with: a device, its clock, what it could do, and who is measured beside us."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

import fastsparse
from benchmarks import ceilings
from benchmarks.bars import Bar
from benchmarks.cases import OURS, figures, short_of_memory
from benchmarks.ceilings import Work
from benchmarks.harness import MIN_ROUNDS, Clock, Contender, measure, wall_clock
from benchmarks.shapes import AnyShape, Given
from benchmarks.traced import traced, tuned

HEADLINE_SHARE = 2  # how much more time a case gets whose figures are shown first
FLUSH_BYTES = 256 << 20  # several times the largest L2
HEAD_START = 1_000_000  # cycles: half a millisecond and more, in which the host gets ahead of the device
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class EventClock:
    """Seconds of the device's time that a call takes, by CUDA events, the L2 cache cold.

    Before each sample a buffer larger than the L2 is read (written, it would leave lines that the call has to
    write back); then the device spins while the host queues the call, so that what is timed is the device's
    work, as in a training step, whose queue is full.
    """

    def __init__(self, device: torch.device) -> None:
        self.buffer = torch.zeros(FLUSH_BYTES // 4, device=device)

    def __call__(self, run: Callable[[], Any]) -> Callable[[], float]:
        def sample() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.buffer.sum()
            torch.cuda._sleep(HEAD_START)
            start.record()
            run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return sample


@dataclass(frozen=True)
class Lab:
    """Where and how cases are measured.

    Attributes:
        device: of every tensor.
        gpu: whether they are the cases of a GPU, which a trial runs on the CPU.
        clock: see :func:`benchmarks.harness.measure`.
        backends: ours, each measured by name beside what runs without one.
        peers: on a CPU, other libraries in the place of PyTorch's compiler and of our own variants.
        choice: our own backends alone, over a grid of shapes.
        compiler: whether torch.compile is measured, which takes up to half a minute a case.
        trace: on a GPU, also what our calls do there, see :mod:`benchmarks.traced`.
        quick: tiny shapes, a trial of the machinery.
        priority: of the least important cases that are measured.
        seconds: time for the rounds of one case; headline cases get twice that.
        until: when all ends, by ``time.monotonic()``.
        ceilings: what the device could do, see :func:`benchmarks.ceilings.measured`.
    """

    device: torch.device
    gpu: bool = False
    clock: Clock = wall_clock
    backends: tuple[str, ...] = ()
    peers: bool = False
    choice: bool = False
    compiler: bool = True
    trace: bool = False
    quick: bool = False
    priority: int = 99
    seconds: float = 2.0
    until: float = math.inf
    ceilings: Mapping[str, float] = field(default_factory=lambda: {"copy": math.inf})

    @classmethod
    def open(cls, device: str, *, known: Mapping[str, float] | None = None, **options: Any) -> "Lab":
        """On the CPU, on the current CUDA device, or for a trial of that one on the CPU.

        Args:
            device: "cpu" or "cuda".
            known: the ceilings, if they were measured before.
            options: attributes.

        Raises:
            SystemExit: there is no CUDA device.
        """
        lab = cls(torch.device("cpu"), device == "cuda", **options)
        if lab.gpu and lab.quick:
            available = (name for name in ("reference", "cpu") if fastsparse.backends()[name].available)
            lab = replace(lab, backends=tuple(available))
        elif lab.gpu and not torch.cuda.is_available():
            raise SystemExit("--device cuda needs a CUDA device, torch finds none (--quick does without)")
        elif lab.gpu:
            own = torch.device("cuda", torch.cuda.current_device())
            lab = replace(lab, device=own, clock=EventClock(own), backends=("triton", "cuda"))
        found = known or ceilings.measured(lab.device, lab.clock, lab.gpu, lab.quick)
        return replace(lab, ceilings=found)

    @property
    def torchs(self) -> bool:
        """Whether what PyTorch can do is measured beyond the plain way."""
        return not self.choice and (self.gpu or not self.peers)

    @property
    def compiles(self) -> bool:
        """Whether torch.compile is measured."""
        return self.torchs and self.compiler and not self.quick

    @property
    def libraries(self) -> bool:
        """Whether other libraries are measured; a GPU's measurements have all in one."""
        return not self.choice and (self.gpu or self.peers)

    def shapes(self, shapes: Sequence[AnyShape]) -> list[AnyShape]:
        return [shape.tiny() if self.quick else shape for shape in shapes]

    def measure(
        self, shape: AnyShape, contenders: Sequence[Contender], work: Work | None = None
    ) -> dict[str, Any]:
        """Figures, ratios and rooflines of one problem; ratios are to those whose names begin as ours."""
        rounds = 2 if self.quick else 5 if self.gpu else MIN_ROUNDS
        seconds = 0.0 if self.quick else self.seconds * (HEADLINE_SHARE if shape.headline else 1)
        options = {"clock": self.clock, "until": self.until, "min_rounds": rounds}
        known = len(tuned())
        found = figures(measure(contenders, seconds=seconds, **options), self.ceilings, work)
        if chosen := tuned(known):
            found["tuned"] = chosen
        named = {f"{OURS}, {name}" for name in self.backends if self.trace}
        for contender in contenders:
            record = found["contenders"][contender.name]
            if contender.name in named and "median" in record:
                record |= traced(contender.run, self.clock, self.device.type == "cuda")
        return found

    def ours(
        self, run: Callable[..., Any], check: Callable[[Any], str], **variants: Sequence[str]
    ) -> list[Contender]:
        """A call as it is, on each backend by name, and there with each value of an option."""
        named = {f"{OURS}, {name}": partial(on_backend, name, run) for name in self.backends}
        found = [Contender(who, call, check) for who, call in ({OURS: run} | named).items()]
        samples = None if self.gpu else 3
        for who, call in (named or {OURS: run}).items():
            for option, values in variants.items():
                ways = {f"{who}, {value}": partial(call, **{option: value}) for value in values}
                found += [Contender(name, way, check, samples=samples) for name, way in ways.items()]
        return found


@dataclass(frozen=True)
class Job:
    """One case to measure.

    Attributes:
        bench: the result file that the case belongs to.
        name: unique within it.
        given: what it is measured on.
        run: measures; returns what :meth:`Lab.measure` does, and more facts.
        bars: what was promised of the case, which may be :meth:`nothing`.
        need: bytes of memory that it takes on a CPU.
        facts: what else describes the problem.
    """

    bench: str
    name: str
    given: Given
    run: Callable[[], dict[str, Any]]
    bars: Callable[[dict[str, Any]], list[Bar]] = lambda case: []
    need: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)

    def case(self, lab: Lab) -> dict[str, Any]:
        if not lab.gpu and (shortage := short_of_memory(self.need)) is not None:
            return self.nothing(shortage)
        return self._described() | self.run()

    def nothing(self, reason: str) -> dict[str, Any]:
        """What stands in the place of the case where it was not run."""
        return self._described() | skipped(reason)

    def _described(self) -> dict[str, Any]:
        shape, data = self.given.shape, {"data": self.given.kind} if self.given.kind else {}
        case = {"name": self.name, "shape": shape.sizes, "headline": shape.headline}
        return case | data | {"dtype": self.given.dtype, **self.facts}


def skipped(reason: str) -> dict[str, Any]:
    return {"skipped": reason, "contenders": {}, "ratios": {}}


def on_backend(name: str, run: Callable[..., Any], **options: Any) -> Any:
    with fastsparse.use_backend(name):
        return run(**options)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By torch.compile, afresh: what was compiled for too many shapes falls back to eager without a word."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)
