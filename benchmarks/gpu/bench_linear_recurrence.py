"""``linear_recurrence``, of single channels and of pairs: against what PyTorch can do."""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import fastsparse
from benchmarks import bench_linear_recurrence, shapes
from benchmarks.bars import Bar
from benchmarks.bench_linear_recurrence import (
    LOG_ROUNDING,
    LOGARITHMS,
    SCAN,
    as_states,
    logarithms,
    loop,
    work,
)
from benchmarks.cases import describe, figures
from benchmarks.gpu.lab import DTYPES, Job, Lab, no_bars, share_bar, with_floor
from benchmarks.gpu.recurrences import LOOP, LOOPED, OF_COPY, OTHERS_MAY, OURS_MAY
from benchmarks.harness import Contender, measure
from benchmarks.recurrences import checked
from benchmarks.shapes import Sequences
from fastsparse import reference
from fastsparse.reference.linear_recurrence import scan


def jobs(lab: Lab, ceilings: dict[str, float]) -> Iterator[Job]:
    headline, *others = shapes.GPU_RECURRENCES
    wanted = [(headline, "fp32", False, 2), (headline, "bf16", False, 3), (headline, "fp32", True, 4)]
    for shape, dtype, pairs, priority in [*wanted, *((shape, "fp32", False, 5) for shape in others)]:
        name = f"{shape.name}, {'pairs' if pairs else 'single channels'}, {dtype}"
        bars = partial(_bars, name, shape) if (shape, dtype) == (headline, "fp32") else no_bars
        run = partial(case, lab, ceilings, name, shape, dtype, pairs=pairs)
        yield Job(priority, "linear_recurrence", name, run, bars)


def _bars(name: str, shape: Sequences, case: dict[str, Any]) -> list[Bar]:
    return [share_bar(f"linear_recurrence, {name} ({shape}): bytes at the rate of a copy", case, OF_COPY)]


def case(
    lab: Lab,
    ceilings: dict[str, float],
    name: str,
    full: Sequences,
    dtype: str,
    *,
    pairs: bool = False,
    alone: bool = False,
) -> dict[str, Any]:
    """Measure one problem, forward; ``alone`` without others."""
    shape = lab.shape(full)
    a, b, exact = problem(shape, dtype, pairs, lab.device)
    contenders = lab.ours(partial(fastsparse.linear_recurrence, a, b), _check(exact, OURS_MAY[dtype]))
    if not alone:
        few, loose = min(shape.T, LOOPED), OTHERS_MAY[dtype]
        contenders.append(
            Contender(
                LOOP,
                partial(loop, a[:, :few], b[:, :few]),
                _check(exact[:, :few], loose),
                samples=3,
                share=few / shape.T,
            )
        )
        if dtype == "fp32":
            contenders.append(Contender(SCAN, partial(scan, a, b), _check(exact, loose)))
        if dtype == "fp32" and not pairs:
            contenders.append(Contender(LOGARITHMS, partial(logarithms, a, b), _check(exact, LOG_ROUNDING)))
    with torch.no_grad():
        timings = measure(contenders, **lab.measuring(full))
    found = describe(name, shape, dtype=dtype) | {"headline": full.headline} | figures(timings)
    return with_floor(found, work(shape, pairs, a.element_size()).bytes / ceilings["copy"])


@lru_cache(maxsize=1)
def problem(shape: Sequences, dtype: str, pairs: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Factors, terms, and the states in fp64."""
    a, b = (part.to(device, DTYPES[dtype]) for part in bench_linear_recurrence.problem(shape, pairs))
    return a, b, reference.linear_recurrence(a.double(), b.double())


def _check(exact: Tensor, tolerance: float) -> Callable[[Tensor], str]:
    check = checked(as_states(exact), tolerance)
    return lambda h: check(as_states(h))
