"""What must be reached, and whether it stands."""

import operator
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

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


def speed_bar(
    name: str,
    case: dict[str, Any],
    against: str,
    required: float,
    *,
    ours: str = "fastsparse",
    relation: str = ">=",
) -> Bar:
    """A bar on the ratio of medians in a finished case."""
    ratio = case["ratios"].get(ours, {}).get(against)
    if ratio is not None:
        return Bar(name, relation, required, ratio["of_medians"])
    reasons = [
        f"{who}: {case['contenders'].get(who, {'failure': 'not run'}).get('failure')}"
        for who in (ours, against)
        if "median" not in case["contenders"].get(who, {})
    ]
    return Bar(name, relation, required, None, note=case.get("skipped") or "; ".join(reasons))


def table(bars: Iterable[Bar]) -> str:
    """The bars as text, the failed ones last, where the eye falls."""
    rows = []
    for bar in sorted(bars, key=lambda bar: not bar.passed):
        measured = "" if bar.measured is None else f"{bar.measured:.3g} {bar.unit}"
        rows.append(
            (bar.verdict, bar.name, f"{bar.relation} {bar.required:.3g} {bar.unit}", measured, bar.note)
        )
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(4)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)
