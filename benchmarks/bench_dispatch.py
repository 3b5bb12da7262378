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
from benchmarks.cases import OURS, Options, run_case
from benchmarks.checks import TopKOracle, close
from benchmarks.harness import Contender
from benchmarks.shapes import Shape
from fastsparse import reference
from fastsparse._options import ACTIVATIONS

TINY = Shape("tiny", 4, 8, 16, 2)
ALLOWED = 10.0  # microseconds
BARE = "bare op"


def run(options: Options) -> Iterator[tuple[dict[str, Any], list[Bar]]]:
    if options.peers:
        return
    ops = torch.ops.fastsparse
    x, weight, bias = data.tokens(TINY, "gaussian"), data.dictionary(TINY, "gaussian"), data.bias(TINY)
    oracle = TopKOracle.of(x, weight, bias, TINY.k)
    yield _case(
        "topk_encode",
        partial(fastsparse.topk_encode, x, weight, bias, k=TINY.k),
        partial(ops.topk_encode.default, x, weight, bias, TINY.k, ACTIVATIONS.index("relu"), None, None),
        oracle.check,
        options,
    )
    values, indices = data.code(TINY, "gaussian")
    expected = reference.spmm(values, indices, weight)
    yield _case(
        "sparse_decode",
        partial(fastsparse.sparse_decode, values, indices, weight),
        partial(ops.spmm.default, values, indices, weight),
        lambda out: close("out", out, expected, 1e-6),
        options,
    )


def _case(
    name: str,
    public: Callable[[], Any],
    bare: Callable[[], Any],
    check: Callable[[Any], str],
    options: Options,
) -> tuple[dict[str, Any], list[Bar]]:
    with torch.no_grad():
        case = run_case(
            name, TINY, [Contender(OURS, public, check), Contender(BARE, bare, check)], options, dtype="fp32"
        )
    medians = [case["contenders"][who].get("median") for who in (OURS, BARE)]
    extra = None if None in medians else (medians[0] - medians[1]) * 1e6
    case["overhead_us"] = extra
    return case, [Bar(f"dispatch, {name}: beyond the bare op", "<=", ALLOWED, extra, unit="us")]
