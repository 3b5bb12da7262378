"""``sddmm`` alone: against a gather and ``bmm``, and one program a token."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import fastsparse
from benchmarks.bench_sparse_decode import d_values
from benchmarks.gpu import baselines, sparse
from benchmarks.gpu.bench_sparse_decode import floor
from benchmarks.gpu.lab import Job, Lab
from benchmarks.harness import Contender
from benchmarks.shapes import Shape


def jobs(lab: Lab, ceilings: dict[str, float]) -> Iterator[Job]:
    for shape, kind, dtype, priority in sparse.wanted():
        name = f"{shape.name}, {kind}, {dtype}"
        yield Job(priority + 1, "sddmm", name, partial(case, lab, ceilings, name, shape, kind, dtype))


def case(
    lab: Lab,
    ceilings: dict[str, float],
    name: str,
    full: Shape,
    kind: str,
    dtype: str,
    *,
    alone: bool = False,
) -> dict[str, Any]:
    """Measure one problem; ``alone`` without others."""
    shape = lab.shape(full)
    values, indices, weight, x = sparse.problem(shape, kind, dtype, lab.device)
    check = sparse.checked(dtype, ("out", d_values(shape, x.float(), weight.float(), indices)))
    contenders = lab.ours(partial(fastsparse.sddmm, x, weight, indices), check)
    if not alone:
        contenders += [
            Contender("torch", partial(baselines.gather_scores, x, weight, indices), check),
            Contender(baselines.ATOMICS, partial(_atomic, x, weight, indices), check),
        ]
    with torch.no_grad():
        least = floor(ceilings, values, indices, weight, out=1)
        return sparse.case(lab, name, full, kind, dtype, contenders, least)


def _atomic(*arguments):
    from benchmarks.gpu import atomics

    return atomics.score(*arguments)
