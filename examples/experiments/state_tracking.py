"""Which recurrences keep track of a state that a sequence of symbols moves about?

- parity: whether the ones so far are odd in number;
- count modulo 5: how many ones there were so far, modulo 5;
- cycle of 3: where moves by -1, 0 and 1 along a cycle of three places have led so far.

Networks are trained on sequences of 64 symbols, with the answer after each of them, and asked on longer ones
too. All have the same width, so that nn.GRU, whose recurrent weights are matrices, has the most parameters.

Source: the tasks are among those of Delétang et al. 2023, "Neural networks and the Chomsky hierarchy", arXiv
2207.02098.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from examples.experiments.recurrent import COLORS, RECURRENCES, Network, parameters, train
from examples.experiments.training import seeded

TASKS = {"parity": (2, 2), "count modulo 5": (2, 5), "cycle of 3": (3, 3)}  # symbols, states
TRAINED = 64
PLACES = {"49 to 64": slice(48, 64), "193 to 256": slice(192, 256)}  # counted from 1


class Sizes(NamedTuple):
    seeds: int
    layers: tuple[int, ...]
    width: int
    steps: int
    batch: int
    held_out: int
    watched: int  # how many times


FULL = Sizes(seeds=3, layers=(1, 2), width=64, steps=500, batch=32, held_out=128, watched=20)
QUICK = Sizes(seeds=1, layers=(1,), width=8, steps=4, batch=4, held_out=4, watched=2)
RATE = 3e-3


def run(*, quick: bool = False) -> dict[str, Any]:
    sizes = QUICK if quick else FULL
    return {
        "sizes": {**sizes._asdict(), "trained": TRAINED},
        "rate": RATE,
        "runs": [
            trained(task, recurrence, layers, seed, sizes)
            for task in TASKS
            for layers in sizes.layers
            for recurrence in RECURRENCES
            for seed in range(sizes.seeds)
        ],
    }


def sequences(task: str, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Symbols and the state after each, both (count, length) int64."""
    symbols, states = TASKS[task]
    drawn = torch.randint(symbols, (count, length), generator=generator)
    moves = drawn - 1 if symbols == 3 else drawn
    return drawn, moves.cumsum(dim=1).remainder(states)


def trained(task: str, recurrence: str, layers: int, seed: int, sizes: Sizes) -> dict[str, Any]:
    network = Network(recurrence, *TASKS[task], sizes.width, layers, seed=seed)
    length = max(place.stop for place in PLACES.values())
    held_out = sequences(task, sizes.held_out, length, seeded(0))
    stream = seeded(1, seed)
    watch = sizes.steps // sizes.watched
    curve = [
        (step, accuracy(network, *(part[:, :TRAINED] for part in held_out))[PLACES["49 to 64"]].mean().item())
        for step in train(
            network, lambda: sequences(task, sizes.batch, TRAINED, stream), steps=sizes.steps, lr=RATE,
            watch=watch,
        )
    ]  # fmt: skip
    at_last = accuracy(network, *held_out)
    return {
        "task": task, "recurrence": recurrence, "layers": layers, "seed": seed,
        "parameters": parameters(network), "steps": [step for step, _ in curve],
        "accuracy": [right for _, right in curve],
        "at_last": {name: at_last[place].mean().item() for name, place in PLACES.items()},
    }  # fmt: skip


@torch.no_grad()
def accuracy(network: Network, symbols: Tensor, states: Tensor) -> Tensor:
    """(T,), the share of sequences with the right answer after each symbol."""
    return (network(symbols).argmax(dim=-1) == states).double().mean(dim=0)


def table(result: dict[str, Any]) -> str:
    """Accuracy at last, each seed's, as Markdown."""
    lines = [
        f"| task | layers | recurrence | parameters | {' | '.join(f'symbols {name}' for name in PLACES)} |",
        "|---|---:|---|---:|" + "---|" * len(PLACES),
    ]
    for (task, layers, recurrence), runs in _grouped(result["runs"]).items():
        cells = [", ".join(f"{run['at_last'][name]:.2f}" for run in runs) for name in PLACES]
        lines.append(
            f"| {task} | {layers} | {recurrence} | {runs[0]['parameters']:,} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def draw(result: dict[str, Any], pyplot: Any) -> dict[str, Any]:
    rows = result["sizes"]["layers"]
    figure, axes = pyplot.subplots(
        len(rows), len(TASKS), figsize=(7.5, 0.6 + 1.9 * len(rows)), layout="constrained", sharex=True,
        sharey=True, squeeze=False,
    )  # fmt: skip
    for (task, layers, recurrence), runs in _grouped(result["runs"]).items():
        each = axes[rows.index(layers), list(TASKS).index(task)]
        for run in runs:
            label = recurrence if run["seed"] == 0 else None
            each.plot(run["steps"], run["accuracy"], color=COLORS[recurrence], linewidth=0.9, label=label)
        each.axhline(1 / TASKS[task][1], color="0.5", linewidth=0.6, linestyle=":", zorder=0)
        each.set_title(f"{task}, {layers} layer{'s' * (layers > 1)}")
        each.set_ylim(0, 1.03)
        each.grid(linewidth=0.3)
        each.spines[["top", "right"]].set_visible(False)
    for each in axes[:, 0]:
        each.set_ylabel("accuracy, symbols 49 to 64")
    for each in axes[-1]:
        each.set_xlabel("training steps")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=5)
    return {"state_tracking": figure}


def _grouped(runs: list[dict[str, Any]]) -> dict[tuple[str, int, str], list[dict[str, Any]]]:
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["task"], run["layers"], run["recurrence"]), []).append(run)
    return groups
