"""The gated recurrences as problems to measure: their pre-activations, layers, oracles, and what people run.

The loop in Python is the definition in ``fastsparse.reference``, which is what people write in PyTorch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsparse
from benchmarks import data
from benchmarks.ceilings import Work
from benchmarks.checks import close, close_states
from benchmarks.harness import Contender
from benchmarks.shapes import Sequences
from fastsparse import reference
from fastsparse.nn import ParaGRU, ParaLSTM

SOLVERS = ("sequential", "newton", "shooting")
COPY = "copy"
LOOP, COMPILED = "torch loop", "torch.compile"
UNROLLED = 16  # steps that are compiled as one: all of them, and all gates, become one loop over channels
STATES = 1e-5  # relative, what fp32 may be off by: see checks.close_states
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

    def loop(self, u: Tensor, weights: Sequence[Tensor]) -> States:
        """A loop over time in Python."""
        return getattr(reference, self.name)(u, *weights)[:-1]

    def problem(self, shape: Sequences, scale: float | None = None) -> tuple[Tensor, list[Tensor]]:
        """u (B, T, 3, H) and recurrent weights, normal: these of the layer's initial scale if not given."""
        scale = 2 / (5 * shape.H) ** 0.5 if scale is None else scale
        u = data.normal(shape.B * shape.T, 3 * shape.H, 50).view(shape.B, shape.T, 3, shape.H)
        return u, [scale * data.normal(rows, shape.H, 51 + i) for i, rows in enumerate(self.rows)]

    def exact(self, u: Tensor, weights: Sequence[Tensor]) -> States:
        """The states in fp64."""
        with torch.no_grad():
            return self.loop(u.double(), [weight.double() for weight in weights])

    def jacobian(self, u: Tensor, weights: Sequence[Tensor], states: States) -> Tensor:
        """(B, T, H), or blocks (B, T, 2, 2, H): the derivative of every step, in the order (c, h)."""
        derivative = import_module(f"fastsparse.reference.{self.name}").jacobian
        ordered = states[0] if self.states == 1 else torch.stack(states[::-1], dim=2)
        before = torch.cat((torch.zeros_like(ordered[:, :1]), ordered[:, :-1]), dim=1)
        return derivative(before, u, *weights)

    def bytes(self, shape: Sequences, itemsize: int = 4) -> float:
        """What must cross memory: three pre-activations read, the states written."""
        return float(itemsize * (3 + self.states) * shape.B * shape.T * shape.H)

    def work(self, shape: Sequences) -> Work:
        return Work(float(self.flops * shape.B * shape.T * shape.H), self.bytes(shape))

    def compiled(self, u: Tensor, weights: Sequence[Tensor]) -> Callable[[], States]:
        """A loop whose body, some steps, is compiled; the last steps, if they are fewer, too."""
        torch._dynamo.reset()
        step = import_module(f"fastsparse.reference.{self.name}").step

        def steps(state: Tensor, u: Tensor, *weights: Tensor) -> Tensor:
            states = []
            for t in range(u.shape[1]):
                state = step(state, u[:, t], *weights)
                states.append(state)
            return torch.stack(states, dim=1)

        run = torch.compile(steps, fullgraph=True, dynamic=False)
        pairs = (self.states,) if self.states > 1 else ()

        def loop() -> States:
            found = [u.new_zeros(u.shape[0], 1, *pairs, u.shape[-1])]
            for part in u.split(UNROLLED, dim=1):
                found.append(run(found[-1][:, -1], part, *weights))
            states = torch.cat(found[1:], dim=1)
            return (states,) if self.states == 1 else (states[:, :, 1], states[:, :, 0])  # those are (c, h)

        return loop


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

    def expected(self) -> dict[str, Tensor]:
        """The outputs, the gradients of the inputs and of all parameters, in fp64."""
        double = self.cell.module(self.module.input_size, self.module.hidden_size).to(self.x.device).double()
        double.load_state_dict(self.module.state_dict())
        x = self.x.detach().double().requires_grad_()
        with fastsparse.use_backend("reference"):
            found = differentiated(lambda x: double(x)[0], x, double.parameters(), self.upstream.double())
        return self.named(found)

    def named(self, found: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(("output", "d_x", *(f"d_{name}" for name in self.leaves())), found, strict=True))

    def check(self, expected: dict[str, Tensor], tolerance: float, found: Sequence[Tensor]) -> str:
        got = self.named(found)
        return ", ".join(close(name, got[name], right.float(), tolerance) for name, right in expected.items())

    def ours(self) -> list[Tensor]:
        return differentiated(lambda x: self.module(x)[0], self.x, self.module.parameters(), self.upstream)

    def loop(self) -> list[Tensor]:
        """The product and a loop over time, differentiated by PyTorch."""
        product, *recurrent = _parts(self.leaves())

        def forward(x: Tensor) -> Tensor:
            u = F.linear(x, product[0].flatten(0, 1), product[1].flatten())
            return self.cell.loop(u.unflatten(-1, (3, -1)), recurrent)[0]

        return differentiated(forward, self.x, self.leaves().values(), self.upstream)


def _parts(leaves: dict[str, Tensor]) -> Iterator[Any]:
    """(input weights, bias), then the recurrent weights."""
    yield leaves["weight_ih_l0"], leaves["bias_l0"]
    yield from (leaf for name, leaf in leaves.items() if not name.startswith(("weight_ih", "bias")))


def differentiated(
    forward: Callable[[Tensor], Tensor], x: Tensor, leaves: Any, upstream: Tensor
) -> list[Tensor]:
    """Outputs, gradient of x, gradients of the leaves."""
    h = forward(x)
    return [h.detach(), *torch.autograd.grad(h, (x, *leaves), upstream)]


def backend_of(op: str) -> str:
    """What serves CPU tensors where no backend is named."""
    own = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastsparse::{op}", "CPU")
    return "cpu" if own and fastsparse.backends()["cpu"].available else "reference"


def copy(moved: float, device: torch.device | str = "cpu") -> Contender:
    """A copy that moves as many bytes as the work does: half of them read, half of them written."""
    source = torch.ones(int(moved) // 8, device=device)
    target = torch.empty_like(source)
    return Contender(COPY, partial(target.copy_, source), lambda answer: "a ceiling: as many bytes, copied")


def checked(exact: States, tolerance: float = STATES) -> Callable[[Any], str]:
    """What judges states: all of them, h first."""

    def check(found: States) -> str:
        return ", ".join(
            close_states(name, got, right, tolerance)
            for name, got, right in zip("hc", found, exact, strict=False)
        )

    return check
