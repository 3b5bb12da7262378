"""``threshold_encode``, forward, at several densities: against comparing all of ``linear``, and gathering."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastsparse
from benchmarks import data, shapes
from benchmarks.bars import Bar, by_machine, speed_bars
from benchmarks.cases import matrix_bytes
from benchmarks.ceilings import Work, products
from benchmarks.checks import BLOCK, UNIT, largest_norm
from benchmarks.harness import Contender, WrongAnswer
from benchmarks.lab import DTYPES, Job, Lab
from benchmarks.shapes import Given, each, grid
from fastsparse.ops._library import OPS

# Of all scores, the part that comes out, and how many times as fast as torch we must be then: where products
# of bf16 are fast, elsewhere nowhere slower.
DENSITIES = {0.001: 2.0, 0.005: 1.8, 0.02: 1.4, 0.1: 1.0}
ROUNDING = {"fp32": 0.0, "bf16": 2.0**-8}
SAMPLED = 64  # tokens, by which thresholds are set


def jobs(lab: Lab) -> Iterator[Job]:
    if lab.peers or (lab.gpu and not {"cuda", "triton"} <= set(OPS["threshold_encode"].kernels)):
        return
    for given in wanted(lab):
        shape, often = given.shape, given.shape.headline and not lab.choice
        for density in DENSITIES if often else [0.005]:
            for masked in (False, True) if often and density == 0.005 else [False]:
                # The weights in fp32 and in bf16; torch's product, its comparison, and what is above.
                need = 2 * matrix_bytes((shape.M, shape.D), (shape.N, shape.M))
                name = given.name(f"{100 * density:g} %{', half masked' if masked else ''}")
                run = partial(case, lab, given, density, masked)
                bars = partial(promised, lab, given, name, density)
                yield Job("threshold_encode", name, given, run, bars, need, {"density": density})


def wanted(lab: Lab) -> Iterator[Given]:
    if lab.choice:
        yield from grid(lab.shapes(shapes.GRID))
    elif lab.gpu:
        yield from each(2, lab.shapes(shapes.GPU_HEADLINE), "bf16", "fp32")
    else:
        headline, *others = lab.shapes(shapes.HEADLINE)
        yield from each(0, [headline], "fp32")
        yield from each(1, [replace(shape, headline=False) for shape in others], "fp32")
        yield from each(1, [replace(headline, headline=False)], "fp32", kinds=["correlated"])


class Problem(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    threshold: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, given: Given, density: float, masked: bool, device: torch.device) -> "Problem":
        shape, kind = given.shape, given.kind
        dense = data.tokens(shape, kind), data.dictionary(shape, kind), data.bias(shape)
        x, weight, bias = (tensor.to(device, DTYPES[given.dtype]) for tensor in dense)
        scores = F.linear(x[:SAMPLED], weight, bias).float().flatten()
        level = scores.topk(max(1, int(density * scores.numel())) + 1).values[-1]
        mask = torch.arange(shape.M, device=device) % 2 == 0 if masked else None
        return cls(x, weight, bias, level.repeat(shape.M), mask)

    def check(self, answer: tuple[Tensor, Tensor, Tensor], *, rounding: float = 0.0) -> str:
        """Judge (values, indices, offsets): by scores in fp32, and how far rounding can move one."""
        values, indices, offsets = answer
        x, weight, N = self.x.float(), self.weight.float(), len(self.x)
        # As TopKOracle has it.
        tolerance = 4 * x.shape[1] ** 0.5 * UNIT * torch.linalg.vector_norm(x, dim=1) * largest_norm(weight)
        worst, size = 0.0, max(1, BLOCK // len(weight))
        for first in range(0, N, size):
            scores = F.linear(x[first : first + size], weight, self.bias.float())
            slack = tolerance[first : first + size, None] + rounding * scores.abs()
            part = slice(int(offsets[first]), int(offsets[min(first + size, N)]))
            counts = offsets[first : first + size + 1].diff()
            rows, latents = (
                torch.arange(len(scores), device=x.device).repeat_interleave(counts),
                indices[part],
            )
            found = torch.zeros_like(scores, dtype=torch.bool)
            found[rows, latents] = True
            above, below = scores - slack > self.threshold, scores + slack < self.threshold
            if self.mask is not None:
                above, below = above & self.mask, below | ~self.mask
            if int(found.sum()) != len(latents) or (above & ~found).any() or (below & found).any():
                raise WrongAnswer("entries differ from what is clearly above its threshold")
            deviation = (values[part].float() - scores[rows, latents]).abs()
            if not (deviation <= slack[rows, latents]).all():  # also when NaN
                raise WrongAnswer(f"values differ by up to {deviation.max():.3g}")
            if len(deviation):
                worst = max(worst, float(deviation.max()))
        return f"values within {worst:.1e}, {len(indices)} entries, all that are clearly above"


def torch_encode(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """What people write today."""
    scores = F.linear(p.x, p.weight, p.bias)
    above = scores > p.threshold.to(scores.dtype)
    if p.mask is not None:
        above &= p.mask
    rows, latents = above.nonzero(as_tuple=True)
    return scores[rows, latents], latents, F.pad(above.sum(dim=1).cumsum(0), (1, 0))


def case(lab: Lab, given: Given, density: float, masked: bool) -> dict[str, Any]:
    problem, shape = Problem.of(given, density, masked, lab.device), given.shape
    x, weight, bias, threshold, mask = problem
    encode = partial(fastsparse.threshold_encode, x, weight, bias, threshold=threshold, latent_mask=mask)
    contenders = lab.ours(encode, problem.check)
    if not lab.choice:
        rounded = partial(problem.check, rounding=ROUNDING[given.dtype])
        contenders.append(Contender("torch", partial(torch_encode, problem), rounded))
    if lab.torchs:
        contenders += products(x, weight)
    entries = density * shape.N * shape.M
    product = 2.0 * shape.N * shape.D * shape.M
    least = matrix_bytes((shape.M, shape.D), (shape.N, shape.D), (2, shape.M), dtype=x.dtype)
    with torch.no_grad():
        return lab.measure(shape, contenders, Work(least + 12 * entries + 8 * shape.N, product, product))


def promised(lab: Lab, given: Given, name: str, density: float, case: dict[str, Any]) -> list[Bar]:
    if lab.gpu:
        return []
    least = by_machine(DENSITIES[density], 1.0) if given.shape.headline else 1.0
    return speed_bars(f"threshold_encode, {name} ({given.shape})", {"torch": least}, case)
