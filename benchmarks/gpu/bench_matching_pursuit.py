"""``matching_pursuit``, forward, in fp32: against PyTorch loops, compiled too, and one over a Gram matrix.

All make what they need of the dictionary within the timing, as training has to.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import data, pursuits, shapes
from benchmarks.bench_matching_pursuit import GRAM, encode
from benchmarks.cases import OURS
from benchmarks.checks import PursuitOracle
from benchmarks.gpu import sparse
from benchmarks.gpu.ceilings import gather_floor
from benchmarks.gpu.lab import Job, Lab
from benchmarks.harness import Contender
from benchmarks.pursuits import Steps
from benchmarks.shapes import Shape

CHECKED = 64  # rows: the oracle is fp64, on the CPU


def jobs(lab: Lab, ceilings: dict[str, float]) -> Iterator[Job]:
    for shape, priority in ((shapes.WIDE_PURSUIT, 2), (shapes.PURSUIT_STEP, 4), (shapes.PURSUIT, 6)):
        name = f"{shape.name}, gaussian, fp32"
        yield Job(priority, "matching_pursuit", name, partial(case, lab, ceilings, name, shape))


def case(lab: Lab, ceilings: dict[str, float], name: str, full: Shape) -> dict[str, Any]:
    """Measure one problem."""
    shape = lab.shape(full)
    x, dictionary, rows, oracle = problem(shape, lab.device)
    check = partial(_check_rows, rows, oracle)
    contenders = lab.ours(partial(encode, x, dictionary, shape.k), check)
    others: dict[str, Callable[..., Steps]] = {
        f"{OURS}, {method}": partial(encode, method=method) for method in ("direct", "gram")
    }
    others |= {"torch": pursuits.torch_loop, GRAM: pursuits.torch_gram_loop}
    if full.headline and not lab.rehearsal:  # compiling takes many seconds
        torch._dynamo.reset()
        step = torch.compile(pursuits.torch_step, fullgraph=True, dynamic=False)
        others["torch.compile"] = partial(pursuits.torch_loop, step=step)
    contenders += [
        Contender(who, partial(encoder, x, dictionary, shape.k), check) for who, encoder in others.items()
    ]
    with torch.no_grad():
        return sparse.case(lab, name, full, "gaussian", "fp32", contenders, floor(ceilings, shape))


def floor(ceilings: dict[str, float], shape: Shape) -> float:
    """The least time that the bytes take: a row of the Gram matrix for every step, all else once."""
    steps = shape.N * shape.k
    moved = 4 * (shape.M * shape.D + 2 * shape.N * shape.D) + 12 * steps
    return gather_floor(ceilings, 4 * steps * shape.M, moved)


@lru_cache(maxsize=1)
def problem(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor, PursuitOracle]:
    """Tokens and dictionary on the device; which rows are checked, and the pursuit of those."""
    x, dictionary = data.tokens(shape, "gaussian"), data.dictionary(shape, "gaussian")
    rows = torch.linspace(0, shape.N - 1, min(shape.N, CHECKED)).long()
    oracle = PursuitOracle.of(x[rows], dictionary, shape.k, nonnegative=True)
    return x.to(device), dictionary.to(device), rows.to(device), oracle


def _check_rows(rows: Tensor, oracle: PursuitOracle, steps: Steps) -> str:
    values, indices, residual = (part[rows].cpu() for part in steps)
    return oracle.check((values, indices, residual))
