"""Language models of single characters: recurrences of equal parameter counts on Python's language reference.

The text is the one that comes with every Python, each paragraph once, cut into windows; every tenth window is
held out. What it holds depends on the version of Python.
"""

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import summarize
from examples.demo.text import clean, language_reference
from examples.experiments.recurrent import COLORS, RECURRENCES, Network, parameters, train
from examples.experiments.training import seeded

COMPARED = tuple(name for name in RECURRENCES if name != "linear, a in (-1, 1)")
BITS = 1 / torch.tensor(2.0).log().item()
RATE = 1e-2


class Sizes(NamedTuple):
    """``width``: a ParaGRU's, which sets the number of parameters for all; ``window``: in characters."""

    seeds: int
    layers: int
    width: int
    window: int
    batch: int
    steps: int
    watched: int  # how many times
    rounds: int  # of timing


FULL = Sizes(seeds=2, layers=2, width=64, window=128, batch=32, steps=400, watched=10, rounds=15)
QUICK = Sizes(seeds=1, layers=1, width=8, window=16, batch=4, steps=4, watched=2, rounds=3)


def run(*, quick: bool = False) -> dict[str, Any]:
    sizes = QUICK if quick else FULL
    training, held_out, symbols = windows(sizes.window)
    if quick:
        held_out = held_out[:20]
    widths = equal_widths(symbols, sizes)
    return {
        "sizes": {
            **sizes._asdict(), "symbols": symbols, "training": training[:, 1:].numel(),
            "held_out": held_out[:, 1:].numel(),
        },
        "rate": RATE,
        "seconds_a_step": timed(widths, symbols, training, sizes),
        "runs": [
            trained(recurrence, width, symbols, training, held_out, seed, sizes)
            for recurrence, width in widths.items()
            for seed in range(sizes.seeds)
        ],
    }  # fmt: skip


def windows(size: int) -> tuple[Tensor, Tensor, int]:
    """Windows of ``size`` characters and one more, to train on and held out; how many characters there are.

    Symbol 0 stands for characters that only held-out text has.
    """
    text = "\n".join(clean(language_reference()).values())
    cut = [text[at : at + size + 1] for at in range(0, len(text) - size, size + 1)]
    training, held_out = [window for i, window in enumerate(cut) if i % 10 != 9], cut[9::10]
    known = {character: i + 1 for i, character in enumerate(sorted(set("".join(training))))}
    coded = (torch.tensor([[known.get(c, 0) for c in w] for w in part]) for part in (training, held_out))
    return *coded, len(known) + 1


def equal_widths(symbols: int, sizes: Sizes) -> dict[str, int]:
    """For each recurrence the width, of which the number of parameters is nearest to that of a ParaGRU."""

    def count(recurrence: str, width: int) -> int:
        return parameters(Network(recurrence, symbols, symbols, width, sizes.layers, seed=0))

    aim = count("ParaGRU", sizes.width)
    near = range(sizes.width // 2, 2 * sizes.width)
    return {name: min(near, key=lambda width: abs(count(name, width) - aim)) for name in COMPARED}


def trained(
    recurrence: str, width: int, symbols: int, training: Tensor, held_out: Tensor, seed: int, sizes: Sizes
) -> dict[str, Any]:
    network = Network(recurrence, symbols, symbols, width, sizes.layers, seed=seed)
    stream = seeded(0, seed)
    curve = [
        (step, bits(network, held_out))
        for step in train(
            network, lambda: batch(training, sizes.batch, stream), steps=sizes.steps, lr=RATE,
            watch=sizes.steps // sizes.watched,
        )
    ]  # fmt: skip
    return {
        "recurrence": recurrence, "seed": seed, "width": width, "parameters": parameters(network),
        "steps": [step for step, _ in curve], "bits": [value for _, value in curve],
    }  # fmt: skip


def batch(windows: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Characters, and those that follow them."""
    drawn = windows[torch.randint(len(windows), (count,), generator=generator)]
    return drawn[:, :-1], drawn[:, 1:]


@torch.no_grad()
def bits(network: Network, windows: Tensor) -> float:
    """Mean bits a character; each window is read from its own beginning."""
    return BITS * network.loss(windows[:, :-1], windows[:, 1:]).item()


def timed(
    widths: dict[str, int], symbols: int, training: Tensor, sizes: Sizes
) -> dict[str, dict[str, float]]:
    """Seconds that a step of training takes: in every round one of each, all of the same windows."""
    seconds: dict[str, list[float]] = {name: [] for name in widths}
    steps = {}
    for name, width in widths.items():
        network = Network(name, symbols, symbols, width, sizes.layers, seed=0)
        steps[name] = train(
            network, lambda: batch(training, sizes.batch, seeded(0)), steps=sizes.rounds + 2, lr=RATE, watch=1
        )
    for turn in range(sizes.rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            next(step)
            if turn >= 2:  # the first steps find their memory
                seconds[name].append(time.perf_counter() - start)
    return {name: summarize(samples) for name, samples in seconds.items()}


def table(result: dict[str, Any]) -> str:
    """Bits a character at last, each seed's, as Markdown."""
    lines = [
        "| recurrence | width | parameters | held-out bits a character | milliseconds a training step |",
        "|---|---:|---:|---|---:|",
    ]
    for name in COMPARED:
        runs = [run for run in result["runs"] if run["recurrence"] == name]
        cells = [f"{name}", f"{runs[0]['width']}", f"{runs[0]['parameters']:,}"]
        cells.append(", ".join(f"{run['bits'][-1]:.3f}" for run in runs))
        cells.append(f"{1e3 * result['seconds_a_step'][name]['median']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(result: dict[str, Any], pyplot: Any) -> dict[str, Any]:
    figure, axes = pyplot.subplots(figsize=(5.5, 3.4), layout="constrained")
    for run in result["runs"]:
        label = run["recurrence"] if run["seed"] == 0 else None
        axes.plot(run["steps"], run["bits"], color=COLORS[run["recurrence"]], linewidth=1, label=label)
    axes.set_xlabel("training steps")
    axes.set_ylabel("bits a character, held-out text")
    axes.grid(linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return {"characters": figure}
