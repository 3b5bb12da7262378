"""How the loss of a model that must squeeze many features through few dimensions falls with these.

A toy model: n features, each active on its own with its probability and then uniform in [0, 2], go through m
dimensions and back, y = relu(x W W' + b). A pull of W's rows towards norm 1 gives every feature a direction,
more of them than there are dimensions (strong superposition); an ordinary weight decay leaves room for the
frequent ones alone (weak). The claim is that the loss falls as 1 / m where superposition is strong, whatever
the features' frequencies, and where it is weak as what is left out does.

Neither x nor y is ever an (N, n) matrix: x W is a sparse product, y the scores above 0, and the loss
|y|^2 - 2 y x + |x|^2 needs y where it is positive, and where x is.

Source: Liu, Liu and Gore 2025, "Superposition yields robust neural scaling", arXiv 2505.10465.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fastsparse
from examples.experiments.training import seeded
from fastsparse import Ragged
from fastsparse.metrics import Totals

PULLS = {"strong": -1.0, "weak": 1.0}  # the weight decay; a negative one pulls towards norm 1, not 0
COLORS = {"strong": "C0", "weak": "C1"}
RATE, WARM_UP, LEAST = 1e-2, 0.1, 0.05  # the learning rate; of the steps; of the rate at last
REPRESENTED = 0.5  # the norm from which on a feature counts as having a direction


class Sizes(NamedTuple):
    n: int
    widths: tuple[int, ...]
    alphas: tuple[float, ...]
    steps: int
    batch: int
    held_out: int  # batches


FULL = Sizes(1000, (8, 16, 32, 64, 128), (0.0, 0.5, 1.0), steps=2000, batch=1024, held_out=64)
QUICK = Sizes(20, (2, 4), (0.5,), steps=3, batch=16, held_out=2)


def run(*, quick: bool = False) -> dict[str, Any]:
    sizes = QUICK if quick else FULL
    runs = [
        measured(alpha, regime, m, sizes) for alpha in sizes.alphas for regime in PULLS for m in sizes.widths
    ]
    return {"sizes": sizes._asdict(), "rate": RATE, "runs": runs}


def probabilities(n: int, alpha: float) -> Tensor:
    """(n,) proportional to i^-(1 + alpha), with sum 1: one active feature a sample on average."""
    p = torch.arange(1, n + 1, dtype=torch.float64) ** -(1 + alpha)
    return p / p.sum()


def samples(p: Tensor, count: int, generator: torch.Generator) -> Ragged:
    """As many rows, in each of which feature i is active with probability p[i], on its own.

    A Poisson number of draws of rate -log(1 - p) is 0 with probability 1 - p: exact, and O(entries).
    """
    n = len(p)
    draws = torch.poisson(-count * torch.log1p(-p), generator=generator).long()
    features = torch.arange(n).repeat_interleave(draws)
    rows = torch.randint(count, features.shape, generator=generator)
    places = torch.unique(rows * n + features)
    offsets = torch.zeros(count + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(places // n, minlength=count), dim=0, out=offsets[1:])
    return Ragged(2 * torch.rand(len(places), generator=generator), places % n, offsets)


class Toy:
    """Weights W (n, m), normal with variance 1 / m, and biases (n,), at first 0.

    The paper's biases are normal at first; most features are so rare that Adam takes long to unlearn that.
    """

    def __init__(self, n: int, m: int, generator: torch.Generator) -> None:
        self.W = (torch.randn(n, m, generator=generator) / math.sqrt(m)).requires_grad_()
        self.b = torch.zeros(n, requires_grad=True)

    def outputs(self, x: Ragged) -> tuple[Ragged, Tensor]:
        """y's positive entries, and y at x's entries."""
        h = fastsparse.spmm(x.values, x.indices, self.W, x.offsets)
        at_x = fastsparse.sddmm(h, self.W, x.indices, x.offsets) + self.b[x.indices]
        return fastsparse.threshold_encode(h, self.W, self.b), at_x.relu()

    def loss(self, x: Ragged) -> Tensor:
        """The squared error of a sample, summed over features, mean over samples."""
        y, at_x = self.outputs(x)
        total = y.values.square().sum() + (x.values * (x.values - 2 * at_x)).sum()
        return total / (len(x.offsets) - 1)


def train(toy: Toy, batch: Callable[[], Ragged], pull: float, steps: int) -> None:
    """Adam on batches, each drawn by a call of ``batch``; the weight decay, or the pull, is apart from it."""
    optimizer = torch.optim.Adam([toy.W, toy.b], fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate = rate_at(step, steps)
        optimizer.zero_grad()
        toy.loss(batch()).backward()
        with torch.no_grad():
            if pull < 0:
                toy.W.add_(toy.W * (1 - 1 / toy.W.norm(dim=1, keepdim=True)), alpha=rate * pull)
            else:
                toy.W.mul_(1 - rate * pull)
        optimizer.step()


def rate_at(step: int, steps: int) -> float:
    """Rises linearly, then falls along a cosine."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return RATE * (step + 1) / warm
    return RATE * (LEAST + (1 - LEAST) * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2)


def measured(alpha: float, regime: str, m: int, sizes: Sizes) -> dict[str, Any]:
    p = probabilities(sizes.n, alpha)
    stream, held_out = seeded(1), seeded(3)
    toy = Toy(sizes.n, m, seeded(2, m))
    train(toy, lambda: samples(p, sizes.batch, stream), PULLS[regime], sizes.steps)
    inputs, outputs, losses = Totals(sizes.n), Totals(sizes.n), []
    with torch.no_grad():
        for _ in range(sizes.held_out):
            x = samples(p, sizes.batch, held_out)
            losses.append(toy.loss(x).item())
            inputs.add_(x)
            outputs.add_(toy.outputs(x)[0])
    found = outputs.measures()
    return {
        "alpha": alpha, "regime": regime, "m": m, "loss": sum(losses) / len(losses),
        "left_out": left_out(p, m), "represented": int((toy.W.norm(dim=1) > REPRESENTED).sum()),
        "l0": found.l0, "effective_features": found.effective_features,
        "superposition": found.effective_features / m,
        "effective_inputs": inputs.measures().effective_features,
    }  # fmt: skip


def left_out(p: Tensor, m: int) -> float:
    """The loss of a model that knows the m most frequent features, and of the others their means."""
    rare = p[m:]
    return float((4 / 3 * rare - rare**2).sum())


def exponent(runs: list[dict[str, Any]], key: str = "loss") -> float:
    """e of key = c m^-e, by least squares of logarithms."""
    return float(-np.polyfit(*(np.log([run[name] for run in runs]) for name in ("m", key)), 1)[0])


# ---- what came out ----


def table(result: dict[str, Any]) -> str:
    """The losses, and how they fall, as Markdown."""
    widths = result["sizes"]["widths"]
    lines = [
        f"| alpha | superposition | {' | '.join(f'm = {m}' for m in widths)} | exponent |",
        "|---:|---|" + "---:|" * (len(widths) + 1),
    ]
    for (alpha, regime), runs in grouped(result).items():
        losses = " | ".join(f"{run['loss']:.4f}" for run in runs)
        lines.append(f"| {alpha:g} | {regime} | {losses} | {exponent(runs):.2f} |")
        if regime == "weak":
            losses = " | ".join(f"{run['left_out']:.4f}" for run in runs)
            lines.append(f"| {alpha:g} | left out | {losses} | {exponent(runs, 'left_out'):.2f} |")
    return "\n".join(lines)


def grouped(result: dict[str, Any]) -> dict[tuple[float, str], list[dict[str, Any]]]:
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for record in result["runs"]:
        groups.setdefault((record["alpha"], record["regime"]), []).append(record)
    return groups


def draw(result: dict[str, Any], pyplot: Any) -> dict[str, Any]:
    alphas = result["sizes"]["alphas"]
    figure, axes = pyplot.subplots(
        1,
        len(alphas),
        figsize=(0.9 + 2.2 * len(alphas), 2.9),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for (alpha, regime), runs in grouped(result).items():
        each, widths = axes[0, alphas.index(alpha)], [run["m"] for run in runs]
        each.plot(
            widths, [run["loss"] for run in runs], "o-", markersize=3, color=COLORS[regime], label=regime
        )
        if regime == "weak":
            each.plot(
                widths, [run["left_out"] for run in runs], "--", color="0.5", linewidth=0.9,
                label="what is left out",
            )  # fmt: skip
        else:
            at_first = runs[0]["loss"] * widths[0]
            each.plot(widths, [at_first / m for m in widths], ":", color="0.5", label="1 / m")
        each.set_xscale("log", base=2)
        each.set_yscale("log")
        each.set_title(f"alpha = {alpha:g}")
        each.set_xlabel("dimensions m")
        each.grid(linewidth=0.3)
        each.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("loss")
    axes[0, -1].legend(frameon=False)
    return {"superposition": figure}
