"""What the public functions cost on top of the registered ops: validation, autocast, choice of backend,
autograd.

Tensors are tiny, so that a call is all overhead.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import fastsparse
from benchmarks import data
from benchmarks.bars import Bar
from benchmarks.cases import OURS
from benchmarks.checks import TopKOracle, close
from benchmarks.harness import Contender
from benchmarks.lab import Job, Lab, median
from benchmarks.shapes import Shape
from fastsparse import reference
from fastsparse._options import ACTIVATIONS

TINY = Shape("tiny", 4, 8, 16, 2)
ALLOWED = 10.0  # microseconds
BARE = "bare op"


def jobs(lab: Lab) -> Iterator[Job]:
    if lab.gpu or lab.peers:
        return
    ops = torch.ops.fastsparse
    x, weight, bias = data.tokens(TINY, "gaussian"), data.dictionary(TINY, "gaussian"), data.bias(TINY)
    yield _job(
        lab,
        "topk_encode",
        lambda: fastsparse.topk_encode(x, weight, bias, k=TINY.k),
        partial(ops.topk_encode.default, x, weight, bias, TINY.k, ACTIVATIONS.index("relu"), None, None),
        TopKOracle.of(x, weight, bias, TINY.k).check,
    )
    values, indices = data.code(TINY, "gaussian")
    expected = reference.spmm(values, indices, weight)
    yield _job(
        lab,
        "sparse_decode",
        lambda: fastsparse.sparse_decode(values, indices, weight),
        partial(ops.spmm.default, values, indices, weight),
        lambda out: close("out", out, expected, 1e-6),
    )


def _job(
    lab: Lab, name: str, public: Callable[[], Any], bare: Callable[[], Any], check: Callable[[Any], str]
) -> Job:
    def run() -> dict[str, Any]:
        with torch.no_grad():
            case = lab.measure(TINY, [Contender(OURS, public, check), Contender(BARE, bare, check)])
        medians = [median(case, who) for who in (OURS, BARE)]
        return case | {"overhead_us": None if None in medians else (medians[0] - medians[1]) * 1e6}

    def bars(case: dict[str, Any]) -> list[Bar]:
        what = f"dispatch, {name}: beyond the bare op"
        return [Bar(what, "<=", ALLOWED, case.get("overhead_us"), unit="us")]

    return Job("dispatch", name, TINY, run, bars, facts={"dtype": "fp32"})
