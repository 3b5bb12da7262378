"""The cases of ``gru_recurrence`` and ``lstm_recurrence`` on a GPU: given pre-activations, and as a layer.

Each of our backends is measured with each solver. Others: a loop in Python, and one whose body is compiled;
pararnn-torch's fused kernels; of a layer cuDNN's, and FlashRNN's, whose recurrences mix channels: other
models, of as many.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.bars import Bar, speed_bar
from benchmarks.cases import OURS, describe, figures
from benchmarks.gated_recurrences import dense, finite
from benchmarks.gpu import baselines
from benchmarks.gpu.lab import DTYPES, Job, Lab, no_bars, on_backend, share_bar, with_floor
from benchmarks.harness import Contender, measure
from benchmarks.peers import pararnn_torch
from benchmarks.recurrences import COMPILED, GRADIENT, SOLVERS, STATES, Cell, Layer, States, checked
from benchmarks.shapes import Sequences

OF_COPY = 0.4  # of the bandwidth of a copy
OF_FUSED = 3.0  # how many times as fast as pararnn-torch's kernels
LOOP = "torch"
LOOPED = 256  # steps of the loop in Python, each of which costs the same
OURS_MAY, OTHERS_MAY = {"fp32": STATES, "bf16": 1e-2}, {"fp32": pararnn_torch.STATES, "bf16": 5e-2}


def jobs(cell: Cell, lab: Lab, ceilings: dict[str, float]) -> Iterator[Job]:
    headline, *others = shapes.GPU_RECURRENCES
    wanted = [(headline, "fp32", 1), (headline, "bf16", 3), *((shape, "fp32", 4) for shape in others)]
    for shape, dtype, priority in wanted:
        name = f"{shape.name}, forward, {dtype}"
        bars = partial(_bars, cell, name, shape) if (shape, dtype) == (headline, "fp32") else no_bars
        run = partial(forward, cell, lab, ceilings, name, shape, dtype)
        yield Job(priority, cell.name, name, run, bars)
    name = f"{headline.name}, with its input product, forward + backward, fp32"
    yield Job(3, cell.name, name, partial(layer, cell, lab, name, headline))


def _bars(cell: Cell, name: str, shape: Sequences, case: dict[str, Any]) -> list[Bar]:
    where = f"{cell.name}, {name} ({shape})"
    return [
        share_bar(f"{where}: bytes at the rate of a copy", case, OF_COPY),
        speed_bar(f"{where}: against {pararnn_torch.NEWTON}", case, pararnn_torch.NEWTON, OF_FUSED),
    ]


def forward(
    cell: Cell,
    lab: Lab,
    ceilings: dict[str, float],
    name: str,
    full: Sequences,
    dtype: str,
    *,
    alone: bool = False,
) -> dict[str, Any]:
    """Measure the op; ``alone`` without others."""
    shape = lab.shape(full)
    u, weights, exact = problem(cell, shape, dtype, lab.device)
    check = checked(exact, OURS_MAY[dtype])
    contenders = lab.ours(partial(cell.run, u, weights), check)
    contenders += [
        Contender(
            f"{OURS}, {who}, {solver}", partial(on_backend, who, partial(cell.run, u, weights, solver)), check
        )
        for who in lab.backends
        for solver in SOLVERS
    ]
    if not alone:
        few = min(shape.T, LOOPED)
        of_few = checked(tuple(states[:, :few] for states in exact), OTHERS_MAY[dtype])
        loop = partial(cell.loop, u[:, :few], weights)
        contenders.append(Contender(LOOP, loop, of_few, samples=3, share=few / shape.T))
        loose = checked(exact, OTHERS_MAY[dtype])
        peers = pararnn_torch.recurrence(cell, u, weights)
        contenders.append(Contender(pararnn_torch.NEWTON, peers[pararnn_torch.NEWTON], loose))
        if full.headline and dtype == "fp32" and not lab.rehearsal:  # compiling takes many seconds
            contenders.append(Contender(COMPILED, cell.compiled(u, weights), loose, samples=3))
    with torch.no_grad():
        timings = measure(contenders, **lab.measuring(full))
    case = describe(name, shape, dtype=dtype) | {"headline": full.headline} | figures(timings)
    return with_floor(case, cell.bytes(shape, u.element_size()) / ceilings["copy"])


@lru_cache(maxsize=1)
def problem(
    cell: Cell, shape: Sequences, dtype: str, device: torch.device
) -> tuple[Tensor, list[Tensor], States]:
    """Pre-activations, weights, and the states in fp64."""
    u, weights = cell.problem(shape)
    u, *weights = (part.to(device, DTYPES[dtype]) for part in (u, *weights))
    return u, weights, cell.exact(u, weights)


def layer(cell: Cell, lab: Lab, name: str, full: Sequences) -> dict[str, Any]:
    """Measure input product, recurrence, and the gradients of the inputs and of all weights."""
    shape = lab.shape(full)
    own = Layer(cell, shape, lab.device)
    expected = own.expected()
    check = partial(own.check, expected, GRADIENT)
    loose = partial(own.check, expected, pararnn_torch.STATES)
    peer = pararnn_torch.PararnnLayer(own)
    contenders = [
        *lab.ours(own.ours, check),
        Contender(LOOP, own.loop, check, samples=2),
        Contender(pararnn_torch.NEWTON, peer.run, lambda found: loose(peer.arranged(found))),
        Contender(f"torch.nn.{cell.dense.__name__}", dense(own), finite),
    ]
    if cell.states > 1:  # it has no GRU in Triton
        contenders.append(Contender(baselines.FLASHRNN, _flashrnn(own), finite))
    case = describe(name, shape, dtype="fp32") | {"headline": full.headline}
    return case | figures(measure(contenders, **lab.measuring(full)))


def _flashrnn(own: Layer) -> Callable[[], list[Tensor]]:
    """Its product with four gates, and its recurrence, in the only dtype of its kernel."""
    H = own.x.shape[-1]
    weights = baselines.flashrnn_weights(H, own.x.device)

    def run() -> list[Tensor]:
        h = baselines.flashrnn_layer(own.x, *weights)
        return [h.detach(), *torch.autograd.grad(h, (own.x, *weights), own.upstream)]

    return run
