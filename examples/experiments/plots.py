"""How the pictures of results are drawn and written."""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.results import replace


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
