"""What a measurement is made with: a device, its clock, and our backends on it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import fastsparse
from benchmarks.bars import Bar
from benchmarks.cases import OURS, AnyShape
from benchmarks.harness import Clock, Contender, wall_clock
from benchmarks.shapes import Sequences, Shape

FLUSH_BYTES = 256 << 20  # several times the largest L2
HEAD_START = 1_000_000  # cycles: half a millisecond and more, in which the host gets ahead of the device
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BFLOAT16_ROUNDING = 2.0**-8


class EventClock:
    """Seconds of the device's time that a call takes, by CUDA events, the L2 cache cold.

    Before each sample a buffer larger than the L2 is written; then the device spins while the host queues
    the call, so that what is timed is the device's work, as in a training step, whose queue is full.
    """

    def __init__(self, device: torch.device) -> None:
        self.buffer = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, run: Callable[[], Any]) -> Callable[[], float]:
        return partial(self._sample, run)

    def _sample(self, run: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.buffer.zero_()
        torch.cuda._sleep(HEAD_START)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class Lab:
    """Where and how a case is measured.

    Attributes:
        device: of every tensor.
        clock: see :func:`benchmarks.harness.measure`.
        backends: ours, each measured by name beside what runs without one.
        rehearsal: on the CPU, on tiny shapes, by the wall: a trial of the machinery.
        seconds: time for the rounds of one case; twice that for a headline's.
        until: when all ends, by ``time.monotonic()``.
    """

    device: torch.device
    clock: Clock
    backends: tuple[str, ...]
    rehearsal: bool
    seconds: float
    until: float

    @classmethod
    def open(cls, *, rehearsal: bool, seconds: float, until: float) -> "Lab":
        """On the current CUDA device, or in rehearsal.

        Raises:
            SystemExit: there is no CUDA device.
        """
        if rehearsal:
            available = [name for name in ("reference", "cpu") if fastsparse.backends()[name].available]
            return cls(torch.device("cpu"), wall_clock, tuple(available), True, 0.0, until)
        if not torch.cuda.is_available():
            raise SystemExit("gpu-bench needs a CUDA device, torch finds none (--rehearse does without)")
        device = torch.device("cuda", torch.cuda.current_device())
        return cls(device, EventClock(device), ("triton", "cuda"), False, seconds, until)

    def shape(self, shape: AnyShape) -> AnyShape:
        return shape.least() if self.rehearsal else shape

    def measuring(self, shape: Shape | Sequences) -> dict[str, Any]:
        """How long, as arguments of :func:`benchmarks.harness.measure`."""
        if self.rehearsal:
            return {"seconds": 0.0, "min_rounds": 2, "clock": self.clock, "until": self.until}
        seconds = self.seconds * (2 if shape.headline else 1)
        return {"seconds": seconds, "min_rounds": 5, "clock": self.clock, "until": self.until}

    def ours(self, run: Callable[[], Any], check: Callable[[Any], str]) -> list[Contender]:
        """A call of fastsparse as it is, and on each backend by name."""
        named = [
            Contender(f"{OURS}, {name}", partial(on_backend, name, run), check) for name in self.backends
        ]
        return [Contender(OURS, run, check), *named]


def no_bars(case: dict[str, Any]) -> list[Bar]:
    return []


@dataclass(frozen=True)
class Job:
    """One case to measure.

    Attributes:
        priority: least first.
        bench: the result file that the case belongs to.
        name: unique within it.
        run: measures; returns the case.
        bars: what was promised of the case, which may be :func:`nothing`.
    """

    priority: int
    bench: str
    name: str
    run: Callable[[], dict[str, Any]]
    bars: Callable[[dict[str, Any]], list[Bar]] = no_bars

    def nothing(self, reason: str) -> dict[str, Any]:
        """What stands in the place of the case where it was not run."""
        return {"name": self.name, "skipped": reason, "contenders": {}, "ratios": {}, "headline": False}


def on_backend(name: str, run: Callable[[], Any]) -> Any:
    with fastsparse.use_backend(name):
        return run()


def median(case: dict[str, Any], contender: str) -> float | None:
    return case["contenders"].get(contender, {}).get("median")


def share_bar(
    name: str, case: dict[str, Any], required: float, *, ours: str = OURS, key: str = "share"
) -> Bar:
    """A bar on the share of the floor that is reached."""
    record = case["contenders"].get(ours, {})
    return Bar(
        name, ">=", required, record.get("roofline", {}).get(key), unit="of the floor",
        note=case.get("skipped") or record.get("failure", ""),
    )  # fmt: skip


def with_floor(case: dict[str, Any], floor: float, names: Sequence[str] | None = None) -> dict[str, Any]:
    """The case with the least time that its work can take, and everyone's share of it."""
    for name, record in case["contenders"].items():
        if "median" in record and (names is None or name in names):
            record["roofline"] = {"floor": floor, "share": floor / record["median"]}
    return case
