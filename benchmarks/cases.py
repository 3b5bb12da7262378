"""What one measured problem leaves behind: figures, ratios and rooflines, ready for JSON."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.ceilings import PRODUCT, Work, roofline
from benchmarks.harness import Timing, ratios

OURS = "fastsparse"
COPY = "copy"  # not a library's, but a copy of as many bytes
KERNEL = "    {us:10.1f} us {calls:5} x {kernel}"
ANOTHER_MODEL = "another model: its answers are not compared"  # a check that is none


def figures(
    timings: Mapping[str, Timing], ceilings: Mapping[str, float], work: Work | None = None
) -> dict[str, Any]:
    summaries = {name: timing.summary() for name, timing in timings.items()}
    timed = {name: timing for name, timing in timings.items() if timing.seconds}
    if work is not None:
        for name, timing in timed.items():
            if name.startswith(PRODUCT):
                summaries[name]["flops_per_second"] = work.product / min(timing.seconds)
            else:
                summaries[name]["roofline"] = roofline(work, timing, timed, ceilings)
    mine = [name for name in timed if name.startswith(OURS)]
    others = [name for name in timed if not name.startswith((OURS, PRODUCT))]
    return {
        "contenders": summaries,
        "ratios": {ours: {other: ratios(timed[ours], timed[other]) for other in others} for ours in mine},
    }


def short_of_memory(need: float) -> str | None:
    """Why a case that takes ``need`` bytes can't be run here; None if it can, or if there is no telling."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}["MemAvailable"]
    if need <= 0.9 * free:
        return None
    return f"needs {need / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are available"


def matrix_bytes(*shapes: tuple[int, int], dtype: torch.dtype = torch.float32) -> float:
    return float(sum(rows * columns for rows, columns in shapes) * dtype.itemsize)


def wrong(case: Mapping[str, Any]) -> list[str]:
    """The contenders of a case whose answers were wrong."""
    return [
        f"{case['name']}: {name}: {record['failure']}"
        for name, record in case["contenders"].items()
        if str(record.get("failure", "")).startswith("wrong answer")
    ]


def median(case: Mapping[str, Any], contender: str) -> float | None:
    return case["contenders"].get(contender, {}).get("median")


def lines(case: dict[str, Any]) -> str:
    """A case as text: one line a contender."""
    if "skipped" in case:
        return f"  skipped: {case['skipped']}"
    out = []
    for name, record in case["contenders"].items():
        if "failure" in record:
            out.append(f"  {name:30} {record['failure']}")
            continue
        ends = [quantity(record[end], record["unit"]) for end in ("q1", "q3") if end in record]
        extras = [
            f"{key.removeprefix('share').removeprefix('_')} floor {value:.0%}"
            for key, value in record.get("roofline", {}).items()
            if key.startswith("share")
        ]
        if "share" in record:
            extras.append(f"from {record['share']:.2g} of the work")
        if "of_the_rest" in record:
            extras.append(f"{record['of_the_rest']:.2g} in the others")
        if record.get("redone"):
            extras.append(f"{record['redone']} channels redone step by step")
        if "graph" in record:
            graph = record["graph"]
            extras.append(f"as a graph {graph if isinstance(graph, str) else quantity(graph, 's')}")
        if "candidates" in record:
            extras.append(f"{record['candidates']:.1f} candidates a token, {record['undecided']} undecided")
        ratios = case["ratios"].get(name, {}).items()
        extras += [f"{ratio['of_medians']:.2f}x {other}" for other, ratio in ratios]
        median, spread = quantity(record["median"], record["unit"]), f"[{', '.join(ends)}]" if ends else ""
        out.append(f"  {name:30} {median:>10} {spread:24} {', '.join(extras)}")
        kernels = record.get("kernels", [])
        out += [f"    {kernels}"] if isinstance(kernels, str) else map(KERNEL.format_map, kernels)
    out += [f"  tuned: {' '.join(one['key'])}: {one['us'][0][0]}" for one in case.get("tuned", [])]
    return "\n".join(out) or f"  {case}"


def quantity(value: float, unit: str) -> str:
    """A figure for people.

    Example:
        >>> quantity(0.0123, "s"), quantity(3.2e6, "bytes")
        ('12.3 ms', '3.05 MiB')
    """
    if unit == "bytes":
        return f"{value / 2**20:.3g} MiB"
    if unit != "s":
        return f"{value:.2g} {unit}"
    for scale, name in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= scale:
            return f"{value / scale:.3g} {name}"
    return f"{value / 1e-9:.3g} ns"
