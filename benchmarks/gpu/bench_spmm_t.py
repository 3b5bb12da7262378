"""``spmm_t`` alone: against ``index_add`` and atomics; the bias gradient's (N, 1) too."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import fastsparse
from benchmarks import shapes
from benchmarks.bench_sparse_decode import d_weight
from benchmarks.gpu import baselines, sparse
from benchmarks.gpu.ceilings import gather_floor
from benchmarks.gpu.lab import Job, Lab
from benchmarks.harness import Contender
from benchmarks.shapes import Shape


def jobs(lab: Lab, ceilings: dict[str, float]) -> Iterator[Job]:
    for shape, kind, dtype, priority in sparse.wanted():
        name = f"{shape.name}, {kind}, {dtype}"
        yield Job(priority + 1, "spmm_t", name, partial(case, lab, ceilings, name, shape, kind, dtype))
    shape = shapes.GPU_HEADLINE[0]
    name = f"{shape.name}, bias gradient, correlated, bf16"
    yield Job(4, "spmm_t", name, partial(case, lab, ceilings, name, shape, "correlated", "bf16", ones=True))


def case(
    lab: Lab,
    ceilings: dict[str, float],
    name: str,
    full: Shape,
    kind: str,
    dtype: str,
    *,
    ones: bool = False,
    alone: bool = False,
) -> dict[str, Any]:
    """Measure one problem; of ``ones`` (N, 1) in place of x; ``alone`` without others."""
    shape = lab.shape(full)
    values, indices, weight, x = sparse.problem(shape, kind, dtype, lab.device)
    M, (N, k) = len(weight), indices.shape
    if ones:
        x = x.new_ones(N, 1)
        right = torch.zeros(M, dtype=torch.float64, device=lab.device)
        right = right.index_add_(0, indices.flatten(), values.double().flatten()).unsqueeze(1).float()
    else:
        right = d_weight(shape, values.float(), indices, x.float())
    check = sparse.checked(dtype, ("out", right))
    contenders = lab.ours(partial(fastsparse.spmm_t, values, indices, x, M), check)
    if not alone:
        contenders += [
            Contender("torch", partial(baselines.index_add, values, indices, x, M), check),
            Contender(baselines.ATOMICS, partial(_atomic, values, indices, x, M), check),
        ]
    D, size = x.shape[1], x.element_size()
    moved = (M * D + N * D + N * k) * size + 8 * N * k
    with torch.no_grad():
        least = gather_floor(ceilings, N * k * D * size, moved)
        return sparse.case(lab, name, full, kind, dtype, contenders, least)


def _atomic(*arguments):
    from benchmarks.gpu import atomics

    return atomics.scatter(*arguments)
