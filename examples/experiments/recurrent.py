"""The recurrent networks that the experiments compare, alike but for the recurrence, trained the same way."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsparse
from fastsparse.nn import ParaGRU, ParaLSTM

WARM_UP, WARM_DOWN = 50, 0.3  # steps over which the learning rate rises; the share of all over which it falls
NORM = 1.0  # of the gradient, at most

Batch = Callable[[], tuple[Tensor, Tensor]]


class DiagonalLinear(nn.Module):
    """h[t] = a h[t - 1] + (1 - a) v, where a, in (0, 1), and v depend on the inputs alone.

    Args:
        signed: a is in (-1, 1) instead.

    Source: minGRU of Feng et al. 2024, "Were RNNs all we needed?", arXiv 2410.01201; signed as Grazzi et al.
    2024, "Unlocking state-tracking in linear RNNs through negative eigenvalues", arXiv 2411.12537, have it.
    """

    def __init__(self, inputs: int, channels: int, *, signed: bool = False) -> None:
        super().__init__()
        self.product = nn.Linear(inputs, 2 * channels)
        self.signed = signed

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        gate, v = self.product(x).chunk(2, dim=-1)
        a = torch.sigmoid(gate)
        b = (1 - a) * v
        return fastsparse.linear_recurrence(2 * a - 1 if self.signed else a, b), None


# From the widths of inputs and states to a layer, of (B, T, D) to (B, T, H) and something else.
RECURRENCES: dict[str, Callable[[int, int], nn.Module]] = {
    "ParaGRU": ParaGRU,
    "ParaLSTM": ParaLSTM,
    "linear, a in (0, 1)": DiagonalLinear,
    "linear, a in (-1, 1)": lambda inputs, channels: DiagonalLinear(inputs, channels, signed=True),
    "torch.nn.GRU": lambda inputs, channels: nn.GRU(inputs, channels, batch_first=True),
}
COLORS = dict(zip(RECURRENCES, ("C0", "C2", "C1", "C4", "0.4"), strict=True))


class Network(nn.Module):
    """Symbols to logits: embedding, layers around which their inputs are added, and a nonlinear read-out.

    The read-out sees one step at a time, and is there so that what a linear recurrence gathers needn't be
    read linearly.

    Args:
        recurrence: one of RECURRENCES.
        symbols, classes: how many of each.
        width: of the embedding and of every layer.
        seed: of the initial weights.
    """

    def __init__(
        self, recurrence: str, symbols: int, classes: int, width: int, layers: int, *, seed: int
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(symbols, width)
            self.layers = nn.ModuleList(RECURRENCES[recurrence](width, width) for _ in range(layers))
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
            self.read_out = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, classes)
            )

    def forward(self, symbols: Tensor) -> Tensor:
        """(B, T) int64 to (B, T, classes)."""
        x = self.embedding(symbols)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))[0]
        return self.read_out(x)

    def loss(self, symbols: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy at all steps, in nats."""
        return F.cross_entropy(self(symbols).flatten(0, 1), targets.flatten())


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def train(network: Network, batch: Batch, *, steps: int, lr: float, watch: int) -> Iterator[int]:
    """Adam on batches, each drawn by a call of ``batch``; yields the steps so far after every ``watch``."""
    optimizer = torch.optim.Adam(network.parameters(), lr=lr, fused=True)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / WARM_UP, (steps + 1 - step) / (WARM_DOWN * steps))
        optimizer.zero_grad()
        network.loss(*batch()).backward()
        nn.utils.clip_grad_norm_(network.parameters(), NORM)
        optimizer.step()
        if step % watch == 0:
            yield step
