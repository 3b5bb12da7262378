"""``poly_norm`` and ``poly_relu``, forward, and with all gradients: against what people write, also compiled.

What must cross memory: x read and y written, and on the way back x and what comes back read, d_x written.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastsparse
from benchmarks import data, shapes
from benchmarks.bars import Bar, speed_bars
from benchmarks.cases import matrix_bytes
from benchmarks.ceilings import Work
from benchmarks.checks import close_all
from benchmarks.harness import Contender
from benchmarks.lab import DTYPES, Job, Lab, compiled
from benchmarks.recurrences import COMPILED, differentiated
from benchmarks.shapes import Given, each, grid
from fastsparse import reference

EPS = 1e-6
# Relative to the norm of the answer: ours, which computes in fp32, and theirs, which rounds in between.
OURS_MAY = {"fp32": 1e-5, "bf16": 1e-2}
OTHERS_MAY = {"fp32": 1e-4, "bf16": 5e-2}
FORWARD, BOTH = "forward", "forward + backward"
MOVED = {FORWARD: 2, BOTH: 5}  # numbers an element
LEAST = 3.0  # times as fast as PyTorch at the first shape, both ways, on a CPU; elsewhere nowhere slower


def norm(x: Tensor) -> Tensor:
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def poly_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What people write today."""
    return weight[0] * norm(x**3) + weight[1] * norm(x**2) + weight[2] * norm(x) + bias


def poly_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What people write today."""
    positive = torch.relu(x)
    return weight[0] * positive**3 + weight[1] * positive**2 + weight[2] * positive + bias


OTHERS: dict[str, Callable[..., Tensor]] = {"poly_norm": poly_norm, "poly_relu": poly_relu}


def jobs(lab: Lab) -> Iterator[Job]:
    if lab.peers:
        return
    for given in wanted(lab):
        for op in OTHERS:
            for ways in (FORWARD,) if lab.choice else MOVED:
                name = given.name(ways)
                need = 20 * matrix_bytes((given.shape.N, given.shape.D))  # in fp64, and what PyTorch keeps
                run, bars = partial(case, lab, given, op, ways), partial(promised, lab, given, op, ways)
                yield Job(op, name, given, run, bars, need)


def wanted(lab: Lab) -> Iterator[Given]:
    chosen = lab.shapes(shapes.ACTIVATIONS)
    if lab.choice:
        yield from grid(chosen, kinds=[""])
    else:
        yield from each(4, chosen, "fp32", "bf16", kinds=[""])


def case(lab: Lab, given: Given, op: str, ways: str) -> dict[str, Any]:
    N, D = given.shape.N, given.shape.D
    drawn = data.normal(N, D, 80), data.normal(1, 3, 81)[0], data.normal(1, 1, 82)[0], data.normal(N, D, 83)
    x, weight, bias, upstream = (part.to(lab.device, DTYPES[given.dtype]) for part in drawn)
    right = expected(op, x, weight, bias, upstream)
    if ways == FORWARD:
        right = {"y": right["y"]}
    leaves = [part.requires_grad_(ways == BOTH) for part in (x, weight, bias)]

    def call(function: Callable[..., Tensor]) -> Any:
        if ways == FORWARD:
            return function(*leaves)
        return differentiated(lambda x: function(x, *leaves[1:]), x, leaves[1:], upstream)

    ours = partial(close_all, right, OURS_MAY[given.dtype])
    contenders = lab.ours(partial(call, getattr(fastsparse, op)), ours)
    if not lab.choice:
        theirs = partial(close_all, right, OTHERS_MAY[given.dtype])
        contenders.append(Contender("torch", partial(call, OTHERS[op]), theirs))
        if lab.compiles:
            contenders.append(Contender(COMPILED, partial(call, compiled(OTHERS[op])), theirs))
    return lab.measure(given.shape, contenders, Work(MOVED[ways] * matrix_bytes((N, D), dtype=x.dtype)))


def expected(op: str, x: Tensor, weight: Tensor, bias: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """The output and the gradients, in fp64."""
    x, weight, bias, upstream = (part.double() for part in (x, weight, bias, upstream))
    eps = (EPS,) if op == "poly_norm" else ()
    y = getattr(reference, op)(x, weight, bias, *eps)
    back = getattr(reference, f"{op}_backward")(x, weight, *eps, upstream, True, True)
    return dict(zip(("y", "d_x", "d_weight", "d_bias"), (y, *back), strict=True))


def promised(lab: Lab, given: Given, op: str, ways: str, case: dict[str, Any]) -> list[Bar]:
    if lab.gpu:
        return []
    least = LEAST if given.shape.name == shapes.ACTIVATIONS[0].name and ways == BOTH else 1.0
    return speed_bars(f"{op}, {given.name(ways)} ({given.shape})", {"torch": least}, case)
