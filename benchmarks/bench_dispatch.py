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
from benchmarks.cases import OURS, median
from benchmarks.checks import TopKOracle, close_all
from benchmarks.harness import Contender
from benchmarks.lab import Job, Lab
from benchmarks.shapes import Given, Shape
from fastsparse import reference
from fastsparse._options import ACTIVATIONS

TINY = Shape("tiny", 4, 8, 16, 2)
ALLOWED = 10.0  # microseconds
BARE = "bare op"


def jobs(lab: Lab) -> Iterator[Job]:
    if lab.gpu or lab.peers:
        return
    ops, k = torch.ops.fastsparse, TINY.k
    x, weight, bias = data.tokens(TINY, "gaussian"), data.dictionary(TINY, "gaussian"), data.bias(TINY)
    public = partial(fastsparse.topk_encode, x, weight, bias, k=k)
    bare = partial(ops.topk_encode.default, x, weight, bias, k, ACTIVATIONS.index("relu"), None, None, 1)
    yield _job(lab, "topk_encode", public, bare, TopKOracle.of(x, weight, bias, k).check)
    code = *data.code(TINY, "gaussian"), weight
    check = partial(close_all, {"out": reference.spmm(*code)}, 1e-6)
    public, bare = partial(fastsparse.sparse_decode, *code), partial(ops.spmm.default, *code, None)
    yield _job(lab, "sparse_decode", public, bare, check)


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

    return Job("dispatch", name, Given(TINY), run, bars)
