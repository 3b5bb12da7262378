"""``topk_encode`` of few tokens, which is to read the weight once: against ``topk(relu(linear))``.

The floor is the time in which memory gives up the weight, M D numbers.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.bars import Bar, speed_bars
from benchmarks.bench_topk_encode import AVX2, case
from benchmarks.cases import matrix_bytes
from benchmarks.lab import Job, Lab
from benchmarks.shapes import Given, Shape, each

TOKENS = (1, 2, 4, 8, 12, 16, 24, 32, 64)
MODELS = (("small", 768, 16384, 32), ("large", 2048, 32768, 64))
SHAPES = tuple(Shape(f"{name}, N={N}", N, D, M, k) for name, D, M, k in MODELS for N in TOKENS)


def jobs(lab: Lab) -> Iterator[Job]:
    if lab.gpu or lab.peers:
        return
    for given in each(1, lab.shapes(SHAPES), "fp32", "bf16"):
        shape = given.shape
        need = 2 * matrix_bytes((shape.M, shape.D), (shape.N, shape.M))
        run, bars = partial(case, lab, given), partial(_promised, given)
        yield Job("few_tokens", given.name(), given, run, bars, need)


def _promised(given: Given, found: dict[str, Any]) -> list[Bar]:
    at = f"topk_encode of few tokens, {given.shape.name} ({given.shape}), {given.dtype}"
    bars = speed_bars(at, {"torch": 1.0}, found)
    if given.dtype == "fp32":
        bars += speed_bars(f"{at}, AVX2 forced", {"torch": 1.0}, found, ours=AVX2)
    return bars
