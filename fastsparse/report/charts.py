"""The page's charts, as inline SVG: colours and fonts come from its style sheet."""

import math
import statistics
from collections.abc import Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 380, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 16, 42  # margins for labels
GAP = 5  # slots of the histogram between the latents that never fire and the others


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def svg(label: str, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
    return f"{head}{''.join(parts)}</svg>"


def text(x: float, y: float, words: str, anchor: str = "middle", kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _grid(y: float) -> str:
    return f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def ticks(top: float, most: int = 5) -> list[float]:
    """Round numbers 0, d, 2d, ... up to ``top``: d is 1, 2 or 5 times a power of ten.

    Example:
        >>> ticks(0.87)
        [0.0, 0.2, 0.4, 0.6, 0.8]
    """
    if not top > 0:
        return [0.0]
    power = 10.0 ** math.floor(math.log10(top / most))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if top / step <= most)
    return [round(i * step, 12) for i in range(int(top / step + 1e-9) + 1)]


def fvu_curve(steps: Sequence[int], fvu: Sequence[float], held_out: float | None = None) -> str:
    """FVU by training step (mean and range of each stretch), and of the held-out text."""
    groups = np.array_split(np.arange(len(steps)), min(len(steps), 120))
    rows = np.array(
        [(steps[g[-1]], *(f([fvu[i] for i in g]) for f in (statistics.fmean, min, max))) for g in groups]
    )
    top = max(rows[:, 3].max(), held_out or 0)
    xs = [_x(step / rows[-1, 0]) for step in rows[:, 0]]
    points = [
        [f"{x:.1f},{_y(value / top):.1f}" for x, value in zip(xs, rows[:, column], strict=True)]
        for column in (1, 2, 3)
    ]
    parts = []
    for tick in ticks(top):
        parts += [_grid(_y(tick / top)), text(LEFT - 8, _y(tick / top) + 4, f"{tick:g}", "end")]
    for tick in ticks(rows[-1, 0], 4):
        parts.append(text(_x(tick / rows[-1, 0]), HEIGHT - BOTTOM + 18, f"{tick:,.0f}"))
    parts += [
        f'<polygon class="band" points="{" ".join(points[1] + points[2][::-1])}"/>',
        f'<polyline class="line" points="{" ".join(points[0])}"/>',
        *_legend("line", 0, "training batches"),
        text(_x(0.5), HEIGHT - 4, "training step"),
    ]
    if held_out is not None:
        y = f"{_y(held_out / top):.1f}"
        parts.append(f'<line class="mark-line" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts += _legend("mark-line", 1, f"held-out text: {held_out:.3f}")
    return svg("FVU over the training steps", parts)


def _legend(kind: str, row: int, label: str) -> list[str]:
    """A sample of a line and its label, at the top right."""
    x, y = _x(0.42), TOP + 10 + 19 * row
    return [
        f'<line class="{kind}" x1="{x:.1f}" x2="{x + 22:.1f}" y1="{y}" y2="{y}"/>',
        text(x + 30, y + 4, label, "start", "note"),
    ]


def density_histogram(counts: np.ndarray, num_tokens: int) -> str:
    """How many latents fire how often, by log10 of the share of tokens; those that never fire stand apart."""
    lowest, width = math.floor(math.log10(1 / num_tokens)), 0.2
    edges = np.arange(lowest, 0 + width / 2, width)
    alive = counts[counts > 0]
    sizes, _ = np.histogram(np.log10(alive / num_tokens), np.append(edges[:-1], 1e-9))
    never = int((counts == 0).sum())
    bars = [(f"{_share(edges[i])} to {_share(edges[i + 1])}", int(size)) for i, size in enumerate(sizes)]
    top = max(1, never, *sizes.tolist())
    slots = len(bars) + GAP  # the first is for those that never fire
    parts = []
    for tick in ticks(top):
        parts += [_grid(_y(tick / top)), text(LEFT - 8, _y(tick / top) + 4, f"{tick:,.0f}", "end")]
    for slot, (label, size), kind in [
        (0, ("never", never), "bar dead"),
        *((i + GAP, bar, "bar") for i, bar in enumerate(bars)),
    ]:
        x, y = _x(slot / slots), _y(size / top)
        box = f'x="{x + 1:.1f}" y="{y:.1f}" width="{_x(1 / slots) - LEFT - 2:.1f}" height="{_y(0) - y:.1f}"'
        title = f"<title>{escape(label)}: {size:,} latents</title>"
        parts.append(f'<rect class="{kind}" {box} rx="1.5">{title}</rect>')
    parts.append(text(_x(0.5 / slots), HEIGHT - BOTTOM + 18, "never"))
    for exponent in range(lowest, 0):
        slot = GAP + (exponent - lowest) / width
        parts.append(text(_x(slot / slots), HEIGHT - BOTTOM + 18, _share(exponent)))
    parts.append(text(_x(0.5), HEIGHT - 4, "share of tokens that a latent fires on"))
    return svg("How many latents fire how often", parts)


def _share(exponent: float) -> str:
    """10^exponent in per cent."""
    return f"{float(f'{100 * 10**exponent:.2g}'):g} %"
