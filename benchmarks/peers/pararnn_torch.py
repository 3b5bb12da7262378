"""pararnn-torch (imports as ``pararnn``): ParaRNN's cells in eager PyTorch on the CPU.

``sequential_apply`` and ``newton_apply`` take inputs, not pre-activations: both begin with ``cell.W_x(x)``,
of all steps at once, and hand the result to their loops. The recurrence alone is had by an identity in the
place of W_x, x being the pre-activations: nothing of the product is left to be timed. Newton runs with its
default configuration, of 3 passes at most. Modules clamp their recurrent weights in every step; where that
would change them, as it never does at the widths that people train, it is turned off.
"""

from collections.abc import Callable, Sequence
from functools import cache, cached_property, partial

import torch
from torch import Tensor, nn

from benchmarks.recurrences import Cell, Layer, States, differentiated

STATES = 1e-3  # relative, what its own tests take for agreement with a loop
# Where its modules keep rows of ours: of the product, of the recurrent weights, and of the peepholes.
ORDER = {"gru_recurrence": (0, 1, 2), "lstm_recurrence": (0, 2, 1)}
LETTERS = {
    "gru_recurrence": (("a_z", "a_r", "a_n"),),
    "lstm_recurrence": (("a_f", "a_o", "a_z"), ("c_f", "c_o")),
}
SEQUENTIAL, NEWTON = "pararnn-torch, sequential", "pararnn-torch, Newton"


def recurrence(cell: Cell, u: Tensor, weights: Sequence[Tensor]) -> dict[str, Callable[[], States]]:
    """Both solvers, given u (B, T, 3, H)."""
    rows = u[:, :, ORDER[cell.name]].flatten(2)

    @cache
    def module() -> nn.Module:
        found = _module(cell, 1, u.shape[-1], weights)
        found.W_x = nn.Identity()
        return found

    def solved(way: str) -> States:
        import pararnn

        if way == SEQUENTIAL:
            return cell.outputs(pararnn.sequential_apply(module(), rows))
        return cell.outputs(pararnn.newton_apply(module(), rows, pararnn.NewtonConfig()))

    return {way: partial(solved, way) for way in (SEQUENTIAL, NEWTON)}


class PararnnLayer:
    """Its cell with the weights of ours, and its Newton, forward and backward."""

    def __init__(self, layer: Layer) -> None:
        self.cell, self.layer = layer.cell, layer

    @cached_property
    def module(self) -> nn.Module:
        leaves, H = self.layer.leaves(), self.layer.x.shape[-1]
        module, order = _module(self.cell, H, H, self.layer.recurrent()), ORDER[self.cell.name]
        with torch.no_grad():
            module.W_x.weight.copy_(leaves["weight_ih_l0"][order,].flatten(0, 1))
            module.W_x.bias.copy_(leaves["bias_l0"][order,].flatten())
        return module

    def forward(self, x: Tensor) -> Tensor:
        import pararnn

        return self.cell.outputs(pararnn.newton_apply(self.module, x, pararnn.NewtonConfig()))[0]

    def run(self) -> list[Tensor]:
        return differentiated(self.forward, self.layer.x, self.module.parameters(), self.layer.upstream)

    def arranged(self, found: list[Tensor]) -> list[Tensor]:
        """The same in the order and layout of ours."""
        h, d_x, *rest = found
        names = dict(zip((name for name, _ in self.module.named_parameters()), rest, strict=True))
        back = [ORDER[self.cell.name].index(gate) for gate in range(3)]
        product, bias = (names[f"W_x.{part}"].unflatten(0, (3, -1))[back] for part in ("weight", "bias"))
        recurrent = iter(
            torch.stack([names[letter] for letter in letters]) for letters in LETTERS[self.cell.name]
        )
        own = {"weight_ih_l0": product, "bias_l0": bias}
        return [h, d_x, *(own[name] if name in own else next(recurrent) for name in self.layer.leaves())]


class ParaRNNLayer(PararnnLayer):
    """The same by its ParaRNN in training, which asks how far Newton's method is off, too."""

    @cached_property
    def forward(self) -> nn.Module:
        import pararnn

        return pararnn.ParaRNN(self.module)


def _module(cell: Cell, inputs: int, H: int, weights: Sequence[Tensor]) -> nn.Module:
    """One of its modules with recurrent weights of ours."""
    import pararnn

    kind = {"gru_recurrence": pararnn.ParaGRU, "lstm_recurrence": pararnn.ParaLSTM}[cell.name]
    module = kind(inputs, H, device=weights[0].device, dtype=weights[0].dtype)
    with torch.no_grad():
        for letters, weight in zip(LETTERS[cell.name], weights, strict=True):
            for letter, row in zip(letters, weight, strict=True):
                getattr(module, letter).copy_(row)
    if max(float(weight.detach().abs().max()) for weight in weights) > module.max_recurrent_norm:
        module.max_recurrent_norm = None
    return module
