"""One SAE step, forward, backward, all gradients: against a dense step, compiled too, and others' ways."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import data, shapes, steps
from benchmarks.bars import Bar, speed_bar
from benchmarks.cases import OURS, describe, figures
from benchmarks.checks import close
from benchmarks.gpu import baselines
from benchmarks.gpu.lab import Job, Lab, no_bars, on_backend
from benchmarks.harness import Contender, measure
from benchmarks.shapes import Shape
from benchmarks.steps import Parameters, Step

REQUIRED = {baselines.SPARSIFY: 3.0, "torch": 8.0}
# Relative to a gradient's norm. In bf16 others choose on rounded scores: a few hundredths of their latents
# are not the k largest, and the gradients of those are other latents'.
OURS_MAY, OTHERS_MAY = {"fp32": 1e-4, "bf16": 2e-2}, {"fp32": 1e-4, "bf16": 0.4}


def jobs(lab: Lab, ceilings: dict[str, float]) -> Iterator[Job]:
    for shape, dtype, priority in (
        (shapes.GPU_STEP[0], "bf16", 1),
        (shapes.GPU_STEP[1], "bf16", 1),
        (shapes.GPU_STEP[1], "fp32", 3),
    ):
        name = f"{shape.name}, {'bf16 autocast' if dtype == 'bf16' else dtype}"
        bars = partial(_bars, name, shape) if dtype == "bf16" else no_bars
        yield Job(priority, "sae_step", name, partial(_case, lab, name, shape, dtype), bars)


def _bars(name: str, shape: Shape, case: dict[str, Any]) -> list[Bar]:
    return [
        speed_bar(f"SAE step, {name} ({shape}): against {who}", case, who, least)
        for who, least in REQUIRED.items()
    ]


def _case(lab: Lab, name: str, full: Shape, dtype: str) -> dict[str, Any]:
    shape = lab.shape(full)
    parameters, x = _problem(shape, dtype, lab.device)
    right = steps.DenseStep(parameters, shape.k).run(x)  # in fp32: plain PyTorch's answer
    expected = {"loss": right.last_loss, **{f"d_{name}": grad for name, grad in right.gradients().items()}}
    del right
    build, built = partial(_build, parameters, shape.k, dtype), []
    contenders = [
        Contender(who, partial(_run, cache(partial(build, kind, built)), built, backend, x), check)
        for who, kind, backend, check in _entrants(lab, dtype, expected)
    ]
    case = describe(name, shape, data="gaussian", dtype=dtype) | {"headline": full.headline}
    return case | figures(measure(contenders, **lab.measuring(full)))


def _entrants(lab: Lab, dtype: str, expected: dict[str, Tensor]) -> Iterator[tuple]:
    exact, loose = (partial(_check, expected, tolerance[dtype]) for tolerance in (OURS_MAY, OTHERS_MAY))
    yield OURS, steps.FastsparseStep, None, exact
    yield baselines.SPARSIFY, baselines.SparsifyStep, None, loose
    yield "torch", steps.DenseStep, None, loose
    for backend in lab.backends:
        yield f"{OURS}, {backend}", steps.FastsparseStep, backend, exact
    yield baselines.ATOMICS, baselines.AtomicStep, None, loose
    if not lab.rehearsal:  # half a minute of compiling
        yield "torch.compile", steps.CompiledStep, None, loose


def _problem(shape: Shape, dtype: str, device: torch.device) -> tuple[Parameters, Tensor]:
    """In bf16: numbers that bf16 holds exactly, so that fp32 and bf16 steps see the same scores."""
    if dtype != "bf16":
        return steps.problem(shape, "gaussian", device)
    weight = data.dictionary(shape, "gaussian").to(device).bfloat16().float()
    x = data.tokens(shape, "gaussian").to(device).bfloat16().float()
    zeros = torch.zeros(shape.M, device=device), torch.zeros(shape.D, device=device)
    return Parameters(weight, zeros[0], weight.clone(), zeros[1]), x


def _build(parameters: Parameters, k: int, dtype: str, kind: type[Step], built: list[Step]) -> Step:
    step = kind(parameters, k)
    step.low = torch.bfloat16 if dtype == "bf16" else None
    built.append(step)
    return step


def _run(build: Callable[[], Step], built: list[Step], backend: str | None, x: Tensor) -> Step:
    step = build()
    for other in built:  # everyone's gradients at once would be many times what a step needs
        other.forget()
    return step.run(x) if backend is None else on_backend(backend, partial(step.run, x))


def _check(expected: dict[str, Tensor], tolerance: float, step: Step) -> str:
    got = {"loss": step.last_loss, **{f"d_{name}": grad for name, grad in step.gradients().items()}}
    return ", ".join(close(name, got[name], right, tolerance) for name, right in expected.items())
