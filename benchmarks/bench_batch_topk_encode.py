"""``batch_topk_encode``, forward: against ``topk(relu(linear).flatten())``, and our ``topk_encode``.

Tokens are of one size, or log-normal with sigma .3, so that rows differ in length.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import fastsparse
from benchmarks import baselines, data, shapes
from benchmarks.bars import Bar, speed_bars
from benchmarks.bench_topk_encode import ROUNDING
from benchmarks.cases import matrix_bytes
from benchmarks.ceilings import Work
from benchmarks.checks import BatchTopKOracle, TopKOracle
from benchmarks.harness import Contender
from benchmarks.lab import DTYPES, Job, Lab
from benchmarks.shapes import Given, each, grid

KINDS = ("gaussian", "gaussian, log-normal rows")
SIGMA = 0.3
ROWS_OF_OURS = "topk_encode"
REQUIRED = {"torch": 2.0, ROWS_OF_OURS: 1 / 1.25}  # how many times as fast, on a CPU


def jobs(lab: Lab) -> Iterator[Job]:
    if lab.peers:
        return
    chosen = lab.shapes(shapes.GPU_HEADLINE[1:] if lab.gpu else shapes.HEADLINE[:1])
    usual = each(4, chosen, *(("bf16", "fp32") if lab.gpu else ("fp32",)), kinds=KINDS)
    for given in grid(lab.shapes(shapes.GRID)) if lab.choice else usual:
        shape = given.shape
        need = 4 * matrix_bytes((shape.M, shape.D), (shape.N, shape.M))  # the product, its relu, the code
        run, bars = partial(case, lab, given), partial(promised, lab, given)
        yield Job("batch_topk_encode", given.name(), given, run, bars, need)


def case(lab: Lab, given: Given) -> dict[str, Any]:
    shape, dtype, rounding = given.shape, DTYPES[given.dtype], ROUNDING[given.dtype]
    N, D, M, total = shape.N, shape.D, shape.M, shape.N * shape.k
    x, weight = data.tokens(shape, "gaussian"), data.dictionary(shape, "gaussian")
    if given.kind != KINDS[0]:
        x *= torch.exp(SIGMA * data.normal(N, 1, 40))
    x, weight, bias = (part.to(lab.device, dtype) for part in (x, weight, data.bias(shape)))
    exact = BatchTopKOracle.of(x, weight, bias, total)
    rounded = BatchTopKOracle.of(x, weight, bias, total, selected=rounding) if rounding else exact
    rows = TopKOracle.of(x, weight, bias, shape.k)
    encode = partial(fastsparse.batch_topk_encode, x, weight, bias, total=total)
    by_rows = partial(fastsparse.topk_encode, x, weight, bias, k=shape.k)
    plain = partial(baselines.torch_batch_encode, x, weight, bias, total)
    contenders = lab.ours(encode, partial(exact.check_code, stored=rounding))
    if not lab.choice:
        contenders += [
            Contender(ROWS_OF_OURS, by_rows, partial(rows.check, stored=rounding)),
            Contender("torch", plain, partial(rounded.check_dense, stored=rounding)),
        ]
    product = 2.0 * N * D * M
    least = matrix_bytes((M, D), (N, D), (1, M), (1, total), dtype=dtype) + 8 * (total + N)
    with torch.no_grad():
        return lab.measure(shape, contenders, Work(least, product, product))


def promised(lab: Lab, given: Given, case: dict[str, Any]) -> list[Bar]:
    at = f"batch_topk_encode, {given.shape.name} ({given.shape}), {given.kind}"
    return [] if lab.gpu else speed_bars(at, REQUIRED, case)
