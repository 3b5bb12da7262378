"""The gated recurrences as problems to measure: their pre-activations, layers, oracles, and what people run.

The loop in Python is the definition in ``fastsparse.reference``, which is what people write in PyTorch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import cycle
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsparse
from benchmarks import data
from benchmarks.bars import Bar, share_bar, speed_bars
from benchmarks.cases import COPY
from benchmarks.ceilings import Work
from benchmarks.checks import close_states
from benchmarks.harness import Contender
from benchmarks.lab import Lab, compiled
from benchmarks.shapes import Given, Sequences
from fastsparse import reference
from fastsparse.nn import ParaGRU, ParaLSTM

SOLVERS = ("sequential", "newton", "shooting")
LOOP, COMPILED = "torch loop", "torch.compile"
CACHED = 1 << 26  # numbers, several times what a cache holds
MIN_COPY = 1 << 20  # numbers: a smaller problem is a trial
UNROLLED = 8  # steps that are compiled as one: all of them, and all gates, become one loop over channels
LOOPED = 1024  # steps of a loop in Python, each of which costs the same
STATES = 1e-5  # relative, what fp32 may be off by: see checks.close_states
OURS_MAY = {"fp32": STATES, "bf16": 1e-2}  # relative, be off by
OTHERS_MAY = {"fp32": 1e-3, "bf16": 5e-2}
OF_COPY = {False: 0.5, True: 0.4}  # on a CPU and on a GPU, how much of a copy's rate we must reach
GRADIENT = 1e-4  # relative to a gradient's norm

States = tuple[Tensor, ...]  # h (B, T, H), and c of an LSTM


@dataclass(frozen=True)
class Cell:
    """A gated recurrence.

    Attributes:
        name: of the op.
        states: how many a channel has, and how many outputs there are.
        rows: of each of the recurrent weights.
        flops: of a channel's step, without its activations.
        module: the layer.
        dense: PyTorch's own layer of that name, whose recurrence mixes all channels: another model.
    """

    name: str
    states: int
    rows: tuple[int, ...]
    flops: int
    module: type[nn.Module]
    dense: type[nn.Module]

    def run(self, u: Tensor, weights: Sequence[Tensor], solver: str = "auto") -> States:
        """fastsparse."""
        found = getattr(fastsparse, self.name)(u, *weights, solver=solver)
        return found if self.states > 1 else (found,)

    def solved(self, u: Tensor, weights: Sequence[Tensor], solver: str) -> tuple[States, Tensor]:
        """The same, and the passes that it took: (B, H), -1 where the channel was redone step by step."""
        *states, info = getattr(fastsparse, self.name)(u, *weights, solver=solver, return_info=True)
        return tuple(states), info.passes

    def loop(self, u: Tensor, weights: Sequence[Tensor]) -> States:
        """A loop over time in Python."""
        return self.outputs(_unrolled(self._definition().step, self._start(u), u, *weights))

    def _definition(self) -> ModuleType:
        return import_module(f"fastsparse.reference.{self.name}")

    def _start(self, u: Tensor) -> Tensor:
        return u.new_zeros(u.shape[0], *((2,) if self.states > 1 else ()), u.shape[-1])

    def outputs(self, states: Tensor) -> States:
        """An LSTM's states are pairs (c, h)."""
        return (states,) if self.states == 1 else (states[:, :, 1], states[:, :, 0])

    def problem(self, shape: Sequences, scale: float | None = None) -> tuple[Tensor, list[Tensor]]:
        """u (B, T, 3, H) and recurrent weights, normal: these of the layer's initial scale if not given."""
        scale = 2 / (5 * shape.H) ** 0.5 if scale is None else scale
        u = data.normal(shape.B * shape.T, 3 * shape.H, 50).view(shape.B, shape.T, 3, shape.H)
        return u, [scale * data.normal(rows, shape.H, 51 + i) for i, rows in enumerate(self.rows)]

    def exact(self, u: Tensor, weights: Sequence[Tensor]) -> States:
        """The states in fp64."""
        with torch.no_grad():
            return getattr(reference, self.name)(u.double(), *(weight.double() for weight in weights))[:-1]

    def jacobian(self, u: Tensor, weights: Sequence[Tensor], states: States) -> Tensor:
        """(B, T, H), or blocks (B, T, 2, 2, H): the derivative of every step, in the order (c, h)."""
        ordered = states[0] if self.states == 1 else torch.stack(states[::-1], dim=2)
        before = torch.cat((torch.zeros_like(ordered[:, :1]), ordered[:, :-1]), dim=1)
        return self._definition().jacobian(before, u, *weights)

    def work(self, shape: Sequences, itemsize: int) -> Work:
        """Three pre-activations read, the states written."""
        steps = float(shape.B * shape.T * shape.H)
        return Work(itemsize * (3 + self.states) * steps, self.flops * steps)

    def compiled(self, u: Tensor, weights: Sequence[Tensor]) -> Callable[[], States]:
        """A loop whose body, some steps, is compiled; the last steps, if they are fewer, too."""
        run = compiled(partial(_unrolled, self._definition().step))

        def loop() -> States:
            state, found = self._start(u), []
            for part in u.split(UNROLLED, dim=1):
                found.append(run(state, part, *weights))
                state = found[-1][:, -1]
            return self.outputs(torch.cat(found, dim=1))

        return loop


def _unrolled(step: Callable[..., Tensor], state: Tensor, u: Tensor, *weights: Tensor) -> Tensor:
    """The states after each step, as the reference lays them out."""
    states = []
    for inputs in u.unbind(1):
        state = step(state, inputs, *weights)
        states.append(state)
    return torch.stack(states, dim=1)


GRU = Cell("gru_recurrence", 1, (3,), 10, ParaGRU, nn.GRU)
LSTM = Cell("lstm_recurrence", 2, (3, 2), 16, ParaLSTM, nn.LSTM)


class Layer:
    """A layer from D = H inputs to H channels, the gradient that comes back to it, and the right answers.

    Attributes:
        module: ours, with its initial weights.
        x: (B, T, H), the inputs, whose gradient is wanted too.
        upstream: (B, T, H), the gradient of the outputs.
    """

    def __init__(self, cell: Cell, shape: Sequences, device: torch.device | str = "cpu") -> None:
        self.cell = cell
        rows = shape.B * shape.T
        x, upstream = (
            data.normal(rows, shape.H, seed).view(shape.B, shape.T, -1).to(device) for seed in (60, 61)
        )
        self.x, self.upstream = x.requires_grad_(), upstream
        self.module = cell.module(shape.H, shape.H, generator=torch.Generator().manual_seed(62)).to(device)

    def leaves(self) -> dict[str, Tensor]:
        return dict(self.module.named_parameters())

    def recurrent(self) -> list[Tensor]:
        return [leaf for name, leaf in self.leaves().items() if not name.startswith(("weight_ih", "bias"))]

    def expected(self) -> dict[str, Tensor]:
        """The outputs, the gradients of the inputs and of all parameters, in fp64."""
        double = self.cell.module(self.module.input_size, self.module.hidden_size).to(self.x.device).double()
        double.load_state_dict(self.module.state_dict())
        x = self.x.detach().double().requires_grad_()
        with fastsparse.use_backend("reference"):
            found = differentiated(lambda x: double(x)[0], x, double.parameters(), self.upstream.double())
        return dict(zip(("output", "d_x", *(f"d_{name}" for name in self.leaves())), found, strict=True))

    def ours(self) -> list[Tensor]:
        return differentiated(lambda x: self.module(x)[0], self.x, self.module.parameters(), self.upstream)

    def loop(self) -> list[Tensor]:
        """The product and a loop over time, differentiated by PyTorch."""

        def forward(x: Tensor) -> Tensor:
            u = F.linear(x, self.leaves()["weight_ih_l0"].flatten(0, 1), self.leaves()["bias_l0"].flatten())
            return self.cell.loop(u.unflatten(-1, (3, -1)), self.recurrent())[0]

        return differentiated(forward, self.x, self.leaves().values(), self.upstream)


def differentiated(
    forward: Callable[[Tensor], Tensor], x: Tensor, leaves: Any, upstream: Tensor
) -> list[Tensor]:
    """Outputs, gradient of x, gradients of the leaves."""
    h = forward(x)
    return [h.detach(), *torch.autograd.grad(h, (x, *leaves), upstream)]


def copy(moved: float) -> Contender:
    """A copy through memory that moves as many bytes as the work does: half of them read, half written.

    It goes around in more memory than a cache holds. The work may find some of its inputs in a cache, as it
    does behind the product that makes them.
    """
    size = int(moved) // 8  # numbers of 4 bytes
    pairs = [(torch.ones(size), torch.ones(size)) for _ in range(-(-CACHED // max(size, MIN_COPY)))]
    turns = cycle(pairs)

    def run() -> None:
        source, target = next(turns)
        target.copy_(source)

    return Contender(COPY, run, lambda answer: "a ceiling: as many bytes, copied through memory")


def copy_bars(gpu: bool, where: str, promised: bool, case: dict[str, Any]) -> list[Bar]:
    """How much of a copy's rate we must reach."""
    if not promised:
        return []
    if gpu:
        return [share_bar(f"{where}: bytes at the rate of a copy", case, OF_COPY[True])]
    return speed_bars(where, {COPY: OF_COPY[False]}, case)


def checked(exact: States, tolerance: float = STATES) -> Callable[[Any], str]:
    """What judges states: all of them, h first."""

    def check(found: Tensor | States) -> str:
        found = (found,) if isinstance(found, Tensor) else found
        return ", ".join(
            close_states(name, got, right, tolerance)
            for name, got, right in zip("hc", found, exact, strict=False)
        )

    return check


def forward(
    lab: Lab, given: Given, run: Callable[..., Any], loop: Callable[[int], Any], exact: States, what: Work,
    others: Iterable[Contender], **variants: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Measure a recurrence beside a copy, a loop in Python over its first steps, and others."""
    shape, dtype = given.shape, given.dtype
    contenders = lab.ours(run, checked(exact, OURS_MAY[dtype]), **variants)
    if not lab.gpu:
        contenders.append(copy(what.bytes))
    if lab.torchs:
        few = min(shape.T, LOOPED)
        of_few = checked(tuple(states[:, :few] for states in exact), OTHERS_MAY[dtype])
        contenders.append(Contender(LOOP, lambda: loop(few), of_few, samples=3, share=few / shape.T))
    with torch.no_grad():
        return lab.measure(shape, [*contenders, *others], what)
