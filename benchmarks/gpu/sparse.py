"""What the benches of sparse products share: the code and the dense sides, and what an answer must be."""

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import data, shapes
from benchmarks.cases import describe, figures
from benchmarks.checks import close
from benchmarks.gpu.lab import DTYPES, Lab, with_floor
from benchmarks.harness import Contender, WrongAnswer, measure
from benchmarks.shapes import Shape

# Relative to the norm of the answer: fp32 sums in any order; in bf16 the rounding of what is stored.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}


def wanted() -> list[tuple[Shape, str, str, int]]:
    """Shape, kind of data, dtype and priority of every case."""
    headline = [(shape, kind, "bf16", 1) for shape in shapes.GPU_HEADLINE for kind in data.KINDS]
    training = [
        (shapes.GPU_TRAINING[0], "correlated", "fp32", 4),
        (shapes.GPU_TRAINING[1], "correlated", "bf16", 4),
        (shapes.GPU_TRAINING[3], "correlated", "fp32", 6),
        (shapes.GPU_FEW_TOKENS[0], "gaussian", "bf16", 6),
    ]
    return [*headline, *((shape, "gaussian", "fp32", 3) for shape in shapes.GPU_HEADLINE), *training]


@lru_cache(maxsize=1)
def problem(shape: Shape, kind: str, dtype: str, device: torch.device) -> tuple[Tensor, ...]:
    """values (N, k), indices (N, k), weight (M, D), x (N, D)."""
    values, indices = data.code(shape, kind)
    dense = data.dictionary(shape, "gaussian"), data.normal(shape.N, shape.D, 40)
    values, weight, x = (tensor.to(device, DTYPES[dtype]) for tensor in (values, *dense))
    return values, indices.to(device), weight, x


def checked(dtype: str, *expected: tuple[str, Tensor]) -> Any:
    """What judges an answer, a tensor or as many as are expected, each with its name."""
    return partial(_close, expected, TOLERANCE[dtype])


def _close(expected: tuple[tuple[str, Tensor], ...], tolerance: float, answer: Any) -> str:
    got = (answer,) if isinstance(answer, Tensor) else tuple(answer)
    if len(got) != len(expected):
        raise WrongAnswer(f"{len(expected)} tensors expected, got {len(got)}")
    pairs = zip(got, expected, strict=True)
    return ", ".join(close(name, one, right, tolerance) for one, (name, right) in pairs)


def case(
    lab: Lab, name: str, full: Shape, kind: str, dtype: str, contenders: list[Contender], floor: float
) -> dict[str, Any]:
    """Measure, with the floor under every contender."""
    shape = lab.shape(full)
    found = describe(name, shape, data=kind, dtype=dtype) | {"headline": full.headline}
    return with_floor(found | figures(measure(contenders, **lab.measuring(full))), floor)
