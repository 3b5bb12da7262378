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

from benchmarks.cases import OURS
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
    """Draw the ratios of a result file as horizontal bars, quartiles of the per-round ratios as whiskers.

    Args:
        result: as :func:`benchmarks.results.read` returns it.
        path: where the SVG goes, whole or not at all; the same result gives the same bytes.

    Returns:
        Whether there was anything to draw.
    """
    if any("series" in case for case in result["cases"]):
        over_time(result, path)
        return True
    rows = [
        (case["name"], other, ratio)
        for case in result["cases"]
        for other, ratio in case["ratios"].get(OURS, {}).items()
        if other != "bare op"
    ]
    if not rows:
        return False
    names = list(dict.fromkeys(name for name, _, _ in rows))
    others = list(dict.fromkeys(other for _, other, _ in rows))
    thickness = 0.8 / len(others)
    with style(result["bench"]) as pyplot:
        figure, axes = pyplot.subplots(
            figsize=(7.5, 0.8 + 0.16 * len(names) * (len(others) + 0.5)), layout="constrained"
        )
        for place, other in enumerate(others):
            mine = [(names.index(name), ratio) for name, who, ratio in rows if who == other]
            at = [position + (place - (len(others) - 1) / 2) * thickness for position, _ in mine]
            length = [ratio["of_medians"] for _, ratio in mine]
            axes.barh(at, [value - 1 for value in length], left=1, height=0.9 * thickness, label=other)
            for y, (_, ratio) in zip(at, mine, strict=True):
                if "by_round_q1" in ratio:
                    axes.plot(
                        [ratio["by_round_q1"], ratio["by_round_q3"]], [y, y], color="black", linewidth=0.7
                    )
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xscale("log")
        ticks = [
            tick
            for tick in (0.25, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200)
            if _inside(tick, axes.get_xlim())
        ]
        axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
        axes.minorticks_off()
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(axis="x", linewidth=0.3)
        axes.set_axisbelow(True)
        axes.set_title(f"{result['bench']}: how many times {_better(result)} fastsparse is than")
        axes.legend(loc="best", frameon=False)
        save(figure, path)
    return True


def over_time(result: dict[str, Any], path: Path) -> None:
    """Draw seconds a call against T, a panel for each series of cases, a line for each contender."""
    panels = list(dict.fromkeys(case["series"] for case in result["cases"]))
    who = list(dict.fromkeys(name for case in result["cases"] for name in case["contenders"]))
    columns = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    with style(result["bench"]) as pyplot:
        figure, grid = pyplot.subplots(
            rows, columns, figsize=(3.75 * columns, 2.8 * rows), layout="constrained", squeeze=False,
            sharex=True,
        )  # fmt: skip
        for axes, panel in zip(grid.flat, panels, strict=False):
            for color, name in enumerate(who):
                points = [
                    (case["shape"]["T"], record["median"])
                    for case in result["cases"]
                    if case["series"] == panel and "median" in (record := case["contenders"].get(name, {}))
                ]
                if points:
                    axes.plot(
                        *zip(*points, strict=True), marker="o", markersize=3, color=f"C{color}", label=name
                    )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.grid(linewidth=0.3)
            axes.set_title(panel)
        for axes in grid[-1]:
            axes.set_xlabel("steps T")
        for axes in grid[:, 0]:
            axes.set_ylabel("seconds a call")
        named = dict(
            pair[::-1] for axes in grid.flat for pair in zip(*axes.get_legend_handles_labels(), strict=True)
        )
        figure.legend(named.values(), named, loc="outside lower center", ncols=len(named), frameon=False)
        save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description="Draw the results.")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    chosen = parser.parse_args(arguments)
    require_matplotlib()
    for path in sorted(chosen.results.glob("?pu-*/*.json")):
        draw(read(path), chosen.folder / path.relative_to(chosen.results).with_suffix(".svg"))
    return 0


def _better(result: dict[str, Any]) -> str:
    return "smaller" if result["bench"] == "memory" else "faster"


def _inside(tick: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= tick <= limits[1]


if __name__ == "__main__":
    sys.exit(main())
