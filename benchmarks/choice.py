"""Which backend and solver won where, from results: what ``fastsparse/ops/_gpu.py`` and ``auto`` should say.

``python -m benchmarks.choice FOLDER`` reads the JSON files that ``python -m benchmarks --device cuda`` wrote.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.cases import OURS, quantity
from benchmarks.results import read

BACKENDS = ("triton", "cuda")
TIE = 1.03  # less is noise


def compare(results: Iterable[dict[str, Any]]) -> list[tuple[str, str, str, dict[str, float], str]]:
    """op, dtype, case, seconds by backend, and which should run it, of every case that both ran."""
    rows = []
    for result in results:
        for case in result["cases"]:
            records = {name: case["contenders"].get(f"{OURS}, {name}", {}) for name in BACKENDS}
            seconds = {name: record["median"] for name, record in records.items() if "median" in record}
            if len(seconds) < len(BACKENDS):
                continue
            first, second = sorted(seconds, key=seconds.get)
            better = first if seconds[second] > TIE * seconds[first] else "either"
            rows.append((result["bench"], case["dtype"], case["name"], seconds, better))
    return rows


def solvers(results: Iterable[dict[str, Any]]) -> list[tuple[str, dict[str, float]]]:
    """Bench or op and case, and seconds by backend and solver, least first, of every case with solvers."""
    rows = []
    for result in results:
        for case in result["cases"]:
            seconds = {
                name.removeprefix(f"{OURS}, "): record["median"]
                for name, record in case["contenders"].items()
                if name.count(", ") == 2 and name.startswith(OURS) and "median" in record
            }
            if seconds:
                rows.append(
                    (
                        f"{result['bench']}, {case['name']}",
                        dict(sorted(seconds.items(), key=lambda item: item[1])),
                    )
                )
    return rows


def table(results: Iterable[dict[str, Any]]) -> str:
    """Every case, then the verdict for each op and dtype, then every case with solvers, the fastest first."""
    results = list(results)
    rows = compare(results)
    if not rows:
        return "\n".join(["no case was run by both backends", *_solver_lines(results)])
    lines = [
        f"{op:17} {dtype:5} {better:7} "
        + "  ".join(f"{who} {quantity(s, 's'):>8}" for who, s in seconds.items())
        + f"  {name}"
        for op, dtype, name, seconds, better in rows
    ]
    for op, dtype in dict.fromkeys((op, dtype) for op, dtype, *_ in rows):
        mine = [(name, seconds, better) for o, d, name, seconds, better in rows if (o, d) == (op, dtype)]
        lost = {  # the worst that always running one would cost
            who: max(seconds[who] / min(seconds.values()) for _, seconds, _ in mine) for who in BACKENDS
        }
        best = min(lost, key=lost.get)
        against = [name for name, _, better in mine if better not in (best, "either")]
        lines.append(
            f"{op}, {dtype}: {best}, at worst {lost[best]:.2f}x the other's time"
            + (f"; the other at: {'; '.join(against)}" if against else "")
        )
    return "\n".join([*lines, *_solver_lines(results)])


def _solver_lines(results: list[dict[str, Any]]) -> list[str]:
    return [
        f"{name}: " + "  ".join(f"{who} {quantity(each, 's')}" for who, each in seconds.items())
        for name, seconds in solvers(results)
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choice", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the results are")
    folder = parser.parse_args(arguments).folder
    files = sorted(folder.glob("*.json"))
    if not files:
        print(f"choice: {folder} must hold results as <bench>.json, found none", file=sys.stderr)
        return 2
    print(table(read(path) for path in files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
