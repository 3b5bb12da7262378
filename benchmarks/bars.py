"""What must be reached, and whether it stands."""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.cases import OURS
from fastsparse.info import environment

COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


@dataclass(frozen=True)
class Bar:
    """One promise.

    Attributes:
        name: what is promised, and where.
        relation: how ``measured`` must stand to ``required``: one of ``>= > <= <``.
        required: the promise.
        measured: the figure; None if there is none.
        unit: of both.
        note: why there is no figure, or what to know about it.
    """

    name: str
    relation: str
    required: float
    measured: float | None
    unit: str = "x"
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.measured is not None and COMPARE[self.relation](self.measured, self.required)

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        return "stands" if self.passed else "falls short"

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def by_machine(with_bf16: float, without: float) -> float:
    """What is required of this machine: of one that multiplies matrices of bf16, or of another."""
    compiled = environment()["compiled"]
    fast = isinstance(compiled, dict) and compiled.get("cpu_features", {}).get("fast_bf16", False)
    return with_bf16 if fast else without


def missing(case: dict[str, Any], *who: str) -> str:
    """Why these contenders of a case have no figure; "" where all have one."""
    records = {one: case["contenders"].get(one, {"failure": "not run"}) for one in who}
    reasons = (f"{one}: {record['failure']}" for one, record in records.items() if "median" not in record)
    return case.get("skipped") or "; ".join(reasons)


def speed_bars(
    where: str,
    required: Mapping[str, float],
    case: dict[str, Any],
    *,
    ours: str = OURS,
    relation: str = ">=",
) -> list[Bar]:
    """Bars on the ratios of medians in a finished case: how many times as fast as these we must be."""
    ratios = case["ratios"].get(ours, {})
    return [
        Bar(
            f"{where}: against {who}", relation, least,
            ratios.get(who, {}).get("of_medians"), note=missing(case, ours, who),
        )
        for who, least in required.items()
    ]  # fmt: skip


def share_bar(name: str, case: dict[str, Any], required: float) -> Bar:
    """A bar on the share of the floor that we reach."""
    share = case["contenders"].get(OURS, {}).get("roofline", {}).get("share")
    return Bar(name, ">=", required, share, unit="of the floor", note=missing(case, OURS))


def table(bars: Iterable[Bar]) -> str:
    """The bars as text, the failed ones last, where the eye falls."""
    rows = []
    for bar in sorted(bars, key=lambda bar: not bar.passed):
        measured = "" if bar.measured is None else f"{bar.measured:.3g} {bar.unit}"
        required = f"{bar.relation} {bar.required:.3g} {bar.unit}"
        rows.append((bar.verdict, bar.name, required, measured, bar.note))
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(4)]
    padded = ([*map(str.ljust, row, widths), row[-1]] for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)
