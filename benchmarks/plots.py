"""One picture a result file: how many times as fast as every contender fastsparse is, or its time over T.

``python -m benchmarks.plots FOLDER`` draws all committed results: FOLDER/<machine>/<bench>.svg.
"""

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.cases import OURS, median
from benchmarks.results import RESULTS, read, replace


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SystemExit("plots need matplotlib: pip install 'fastsparse-torch[bench]'") from None


@contextlib.contextmanager
def style(salt: str) -> Iterator[Any]:
    """matplotlib's pyplot in the style of all pictures here; the same picture and salt, the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": salt, "font.size": 8, "svg.fonttype": "path"}):
        yield pyplot


def save(figure: Any, path: Path) -> None:
    """Write a figure as SVG, an element a line, whole or not at all, and close it."""
    from matplotlib import pyplot

    picture = io.BytesIO()
    figure.savefig(picture, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    replace(path, re.sub(rb"\n(?=[^<]*>)", b" ", picture.getvalue()))


def draw(result: dict[str, Any], path: Path) -> bool:
    """Draw a result file: its times over T where it has series, else how many times as fast we are.

    Args:
        result: as :func:`benchmarks.results.read` returns it.
        path: where the SVG goes, whole or not at all; the same result gives the same bytes.

    Returns:
        Whether there was anything to draw.
    """
    series = any("series" in case for case in result["cases"])
    rows = [
        (case["name"], other, ratio)
        for case in result["cases"]
        for other, ratio in case["ratios"].get(OURS, {}).items()
        if other != "bare op"
    ]
    if not series and not rows:
        return False
    with style(result["bench"]) as pyplot:
        save(over_time(result, pyplot) if series else as_bars(result["bench"], rows, pyplot), path)
    return True


def as_bars(bench: str, rows: list[tuple[str, str, dict[str, float]]], pyplot: Any) -> Any:
    """Of every case and contender the ratio, quartiles of the per-round ratios as whiskers."""
    names, others = (list(dict.fromkeys(row[column] for row in rows)) for column in (0, 1))
    thickness = 0.8 / len(others)
    size = 7.5, 0.8 + 0.16 * len(names) * (len(others) + 0.5)
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    for place, other in enumerate(others):
        mine = [(name, ratio) for name, who, ratio in rows if who == other]
        at = [names.index(name) + (place - (len(others) - 1) / 2) * thickness for name, _ in mine]
        length = [ratio["of_medians"] - 1 for _, ratio in mine]
        axes.barh(at, length, left=1, height=0.9 * thickness, label=other)
        for y, (_, ratio) in zip(at, mine, strict=True):
            if "by_round_q1" in ratio:
                ends = ratio["by_round_q1"], ratio["by_round_q3"]
                axes.plot(ends, [y, y], color="black", linewidth=0.7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    least, most = axes.get_xlim()
    ticks = [tick for tick in (0.25, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200) if least <= tick <= most]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="x", linewidth=0.3)
    axes.set_axisbelow(True)
    axes.set_title(
        f"{bench}: how many times {'smaller' if bench == 'memory' else 'faster'} fastsparse is than"
    )
    axes.legend(loc="best", frameon=False)
    return figure


def over_time(result: dict[str, Any], pyplot: Any) -> Any:
    """Seconds a call against T, a panel for each series of cases, a line for each contender."""
    panels = list(dict.fromkeys(case["series"] for case in result["cases"]))
    who = list(dict.fromkeys(name for case in result["cases"] for name in case["contenders"]))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    size = 3.75 * columns, 2.8 * rows
    figure, grid = pyplot.subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False, sharex=True
    )
    named = {}
    for axes, panel in zip(grid.flat, panels, strict=False):
        cases = [case for case in result["cases"] if case["series"] == panel]
        for color, name in enumerate(who):
            points = [(case["shape"]["T"], median(case, name)) for case in cases if median(case, name)]
            if points:
                (named[name],) = axes.plot(*zip(*points, strict=True), "o-", markersize=3, color=f"C{color}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(linewidth=0.3)
        axes.set_title(panel)
    for axes in grid[-1]:
        axes.set_xlabel("steps T")
    for axes in grid[:, 0]:
        axes.set_ylabel("seconds a call")
    figure.legend(named.values(), named, loc="outside lower center", ncols=len(named), frameon=False)
    return figure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description="Draw the results.")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    chosen = parser.parse_args(arguments)
    require_matplotlib()
    for path in sorted(chosen.results.glob("?pu-*/*.json")):
        draw(read(path), chosen.folder / path.relative_to(chosen.results).with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
