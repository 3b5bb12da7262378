"""What a transcoder explains of an MLP, by how many latents, with a skip connection and without.

Of a small language model's middle MLP (of `make demo`): from what goes into it what comes out of it, before
that is added to the rest. An affine map, which is what the skip connection can do alone, is fitted by least
squares for comparison; and a transcoder without a skip connection, but with more latents, so that it has as
many parameters. Scored on tokens that none has seen; the first seed chose the rate, the others are held out.

Sources: Dunefsky et al. 2024, arXiv 2406.11944 (transcoders); Paulo et al. 2025, arXiv 2501.18823 (skip).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from examples.experiments.encoders import FULL, QUICK, activations
from examples.experiments.training import seeded, train
from fastsparse.nn import Transcoder, fvu

LAYER = "encoder.layer.2"  # the third of six
INPUTS, OUTPUTS = f"{LAYER}.attention.output", f"{LAYER}.output.dense"
KS = (16, 32, 64)
RATE = 4e-3  # the better of 1e-3 and 4e-3 for both kinds, at every k, by the first seed
COLORS = {"skip": "C1", "no skip": "C0", "no skip, as many parameters": "C2"}


class Pairs(NamedTuple):
    """Tokens before a part of a network and after it, in the same order."""

    x: Tensor
    y: Tensor


def run(*, quick: bool = False) -> dict[str, Any]:
    sizes = QUICK if quick else FULL
    if quick:
        x = torch.randn(1000, 16, generator=seeded(1))
        y = x @ torch.randn(16, 16, generator=seeded(2)) + x.square()
        learning, validation = Pairs(x[200:], y[200:]), Pairs(x[:200], y[:200])
    else:
        sides = [activations(INPUTS), activations(OUTPUTS)]
        learning, validation = (Pairs(*side) for side in zip(*sides, strict=True))
    ks = KS[: sizes.points] if not quick else (4,)
    return {
        "sizes": {**sizes._asdict(), "D": learning.x.shape[1], "tokens": len(learning.x)},
        "rate": RATE,
        "affine": affine(learning, validation),
        "trained": [
            scored(name, k, seed, learning, validation, sizes)
            for seed in range(sizes.seeds)
            for k in ks
            for name in COLORS
        ],
    }


def affine(learning: Pairs, validation: Pairs) -> float:
    """The FVU of the best affine map."""
    ones = learning.x.new_ones(len(learning.x), 1)
    solution = torch.linalg.lstsq(torch.cat([learning.x, ones], dim=1).double(), learning.y.double()).solution
    outputs = validation.x.double() @ solution[:-1] + solution[-1]
    return float(fvu(outputs, validation.y.double()))


def scored(name: str, k: int, seed: int, learning: Pairs, validation: Pairs, sizes: Any) -> dict[str, Any]:
    """Train one, and say what it leaves unexplained of tokens that it hasn't seen."""
    d_in, d_out = learning.x.shape[1], learning.y.shape[1]
    extra = d_in * d_out // (d_in + d_out + 1) if name == "no skip, as many parameters" else 0
    model = Transcoder(
        d_in, d_out, sizes.M + extra, k, skip=name == "skip", generator=seeded(2, seed),
        dead_after=100 * sizes.batch,
    )  # fmt: skip
    model.init_decoder_bias_(*(side[: sizes.batch * 8] for side in learning))
    model = train(model, stream(learning, sizes.batch, seed), steps=sizes.steps, lr=RATE)
    with torch.no_grad():
        explained = fvu(model(validation.x), validation.y)
    return {
        "transcoder": name, "k": k, "seed": seed, "fvu": float(explained), "dead": int(model.dead.sum()),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }  # fmt: skip


def stream(pairs: Pairs, batch: int, seed: int) -> Callable[[], tuple[Tensor, ...]]:
    """Batches of pairs drawn at random."""
    generator = seeded(3, seed)

    def drawn() -> tuple[Tensor, ...]:
        rows = torch.randint(len(pairs.x), (batch,), generator=generator)
        return pairs.x[rows], pairs.y[rows]

    return drawn


# ---- what came out ----


def table(result: dict[str, Any]) -> str:
    """Means over the held-out seeds, with the least and the largest FVU, as Markdown."""
    lines = ["| transcoder | k | parameters | FVU | dead latents |", "|---|---:|---:|---:|---:|"]
    for name in COLORS:
        for k, records in by_k(result, name).items():
            values = [record["fvu"] for record in records]
            dead = sum(record["dead"] for record in records) / len(records)
            spread = f"{sum(values) / len(values):.4f} ({min(values):.4f} to {max(values):.4f})"
            lines.append(f"| {name} | {k} | {records[0]['parameters']:,} | {spread} | {dead:.0f} |")
    lines.append(f"| affine map | | | {result['affine']:.4f} | |")
    return "\n".join(lines)


def by_k(result: dict[str, Any], name: str) -> dict[int, list[dict[str, Any]]]:
    """The records of a kind; of held-out seeds where there are any."""
    held_out = max(record["seed"] for record in result["trained"]) > 0
    found: dict[int, list[dict[str, Any]]] = {}
    for record in result["trained"]:
        if record["transcoder"] == name and (record["seed"] > 0) == held_out:
            found.setdefault(record["k"], []).append(record)
    return found


def draw(result: dict[str, Any], pyplot: Any) -> dict[str, Any]:
    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    for name, color in COLORS.items():
        groups = by_k(result, name)
        means = [sum(r["fvu"] for r in records) / len(records) for records in groups.values()]
        axes.plot(list(groups), means, color=color, label=name)
        for k, records in groups.items():
            axes.plot([k] * len(records), [r["fvu"] for r in records], "o", markersize=2.5, color=color)
    axes.axhline(result["affine"], color="0.5", linestyle="--", label="affine map")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(groups), [str(k) for k in groups])
    axes.set_ylim(0)
    axes.set_xlabel("latents a token (k)")
    axes.set_ylabel("variance of the MLP's output\nunexplained (FVU), held-out tokens")
    axes.grid(linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return {"transcoders": figure}
