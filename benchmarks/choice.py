"""Which backend and solver won where: what ``KERNELS`` in ``fastsparse/ops`` and ``auto`` should say."""

from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.cases import OURS, quantity

BACKENDS = ("triton", "cuda")
TIE = 1.03  # less is noise


def _ours(results: Iterable[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any], dict[str, float]]]:
    """Bench, case, and seconds by backend, or by backend and solver, the fastest first."""
    for result in results:
        for case in result["cases"]:
            seconds = {
                name.removeprefix(f"{OURS}, "): record["median"]
                for name, record in case["contenders"].items()
                if name.startswith(f"{OURS}, ") and "median" in record
            }
            yield result["bench"], case, dict(sorted(seconds.items(), key=lambda item: item[1]))


def compare(results: Iterable[dict[str, Any]]) -> list[tuple[str, str, str, dict[str, float], str]]:
    """op, dtype, case, seconds by backend, and which should run it, of every case that both ran."""
    rows = []
    for bench, case, every in _ours(results):
        seconds = {name: each for name, each in every.items() if name in BACKENDS}
        if len(seconds) == len(BACKENDS):
            (first, least), (_, second) = seconds.items()
            better = first if second > TIE * least else "either"
            rows.append((bench, case["dtype"], case["name"], seconds, better))
    return rows


def solvers(results: Iterable[dict[str, Any]]) -> list[tuple[str, dict[str, float]]]:
    """Bench or op and case, and seconds by backend and solver, of every case with solvers."""
    found = (
        (f"{bench}, {case['name']}", {name: each for name, each in seconds.items() if ", " in name})
        for bench, case, seconds in _ours(results)
    )
    return [(name, seconds) for name, seconds in found if seconds]


def table(results: Iterable[dict[str, Any]]) -> str:
    """Every case, then the verdict for each op and dtype, then every case with solvers, the fastest first."""
    results = list(results)
    rows = compare(results)
    lines = [] if rows else ["no case was run by both backends"]
    for op, dtype, name, seconds, better in rows:
        figures = "  ".join(f"{who} {quantity(seconds[who], 's'):>8}" for who in BACKENDS)
        lines.append(f"{op:17} {dtype:5} {better:7} {figures}  {name}")
    for op, dtype in dict.fromkeys((op, dtype) for op, dtype, *_ in rows):
        mine = [(name, seconds, better) for o, d, name, seconds, better in rows if (o, d) == (op, dtype)]
        lost = {  # the worst that always running one would cost
            who: max(seconds[who] / min(seconds.values()) for _, seconds, _ in mine) for who in BACKENDS
        }
        best = min(lost, key=lost.get)
        against = [name for name, _, better in mine if better not in (best, "either")]
        others = f"; the other at: {'; '.join(against)}" if against else ""
        lines.append(f"{op}, {dtype}: {best}, at worst {lost[best]:.2f}x the other's time{others}")
    for name, seconds in solvers(results):
        lines.append(f"{name}: " + "  ".join(f"{who} {quantity(each, 's')}" for who, each in seconds.items()))
    return "\n".join(lines)
