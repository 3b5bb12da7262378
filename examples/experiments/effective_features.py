"""How near the number of effective features comes to the number of features that there are.

F = exp(entropy) of the latents' shares of all activity, psi = F / D. Of codes that use K latents equally it
is K. Here a TopK autoencoder learns data made of a known number of features, each as frequent as any other,
and F of its codes is held against that number; and against F of the true codes, which chance makes a little
less.

Source: arXiv 2512.13568.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastsparse
from examples.experiments.training import seeded, train
from fastsparse import TopK
from fastsparse.metrics import Totals, evaluate
from fastsparse.nn import TopKSAE

RATE = 2e-3
FOUND = 0.9  # the cosine from which on a latent's atom counts as a feature's


class Sizes(NamedTuple):
    D: int
    M: int
    features: tuple[int, ...]
    active: int
    seeds: int
    steps: int
    batch: int
    held_out: int


FULL = Sizes(64, 512, (16, 32, 64, 128, 256), active=4, seeds=3, steps=3000, batch=512, held_out=16384)
QUICK = Sizes(8, 16, (4, 8), active=2, seeds=1, steps=3, batch=32, held_out=64)


def run(*, quick: bool = False) -> dict[str, Any]:
    sizes = QUICK if quick else FULL
    return {
        "sizes": sizes._asdict(),
        "rate": RATE,
        "runs": [trained(K, seed, sizes) for K in sizes.features for seed in range(sizes.seeds)],
    }


def samples(count: int, K: int, active: int, generator: torch.Generator) -> TopK:
    """Codes of ``active`` of K features, any as likely as another, with values uniform in [0.5, 1.5]."""
    indices = torch.rand(count, K, generator=generator).topk(active).indices
    return TopK(0.5 + torch.rand(count, active, generator=generator), indices)


def trained(K: int, seed: int, sizes: Sizes) -> dict[str, Any]:
    """Learn from features that are random directions, and count."""
    features = F.normalize(torch.randn(K, sizes.D, generator=seeded(1, K, seed)))
    stream = seeded(2, seed)

    def batch() -> Tensor:
        return fastsparse.spmm(*samples(sizes.batch, K, sizes.active, stream), features)

    sae = TopKSAE(sizes.D, sizes.M, sizes.active, dead_after=100 * sizes.batch, generator=seeded(3, seed))
    train(sae, batch, steps=sizes.steps, lr=RATE)
    true = samples(sizes.held_out, K, sizes.active, seeded(4, seed))
    totals = Totals(K)
    totals.add_(true)
    measures = evaluate(sae, fastsparse.spmm(*true, features).split(sizes.batch))
    fired = sae.W_dec.detach()[measures.density > 0]
    return {
        "K": K, "seed": seed, "true": totals.measures().effective_features,
        "effective_features": measures.effective_features, "superposition": measures.superposition,
        "fvu": measures.fvu, "fired": len(fired),
        "found": float(((features @ fired.T).amax(dim=1) > FOUND).double().mean()),
    }  # fmt: skip


# ---- what came out ----


def table(result: dict[str, Any]) -> str:
    """Means over seeds, with the least and the largest F, as Markdown."""
    lines = [
        "| features | F, true codes | F, autoencoder's | psi | latents that fire | features found | FVU |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for K, runs in grouped(result).items():
        values = [run["effective_features"] for run in runs]
        true, psi, fired, found, fvu = (
            sum(run[key] for run in runs) / len(runs)
            for key in ("true", "superposition", "fired", "found", "fvu")
        )
        spread = f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})"
        lines.append(f"| {K} | {true:.1f} | {spread} | {psi:.2f} | {fired:.0f} | {found:.1%} | {fvu:.4f} |")
    return "\n".join(lines)


def grouped(result: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    return {K: [run for run in result["runs"] if run["K"] == K] for K in result["sizes"]["features"]}


def draw(result: dict[str, Any], pyplot: Any) -> dict[str, Any]:
    figure, axes = pyplot.subplots(figsize=(4, 3.2), layout="constrained")
    counts = result["sizes"]["features"]
    axes.plot(counts, counts, color="0.5", linewidth=0.8, linestyle=":", label="as many as there are")
    for key, color, label in (
        ("effective_features", "C0", "F of the autoencoder's codes"), ("fired", "C1", "latents that fire"),
    ):  # fmt: skip
        pairs = [(run["K"], run[key]) for run in result["runs"]]
        axes.plot(*zip(*pairs, strict=True), "o", markersize=3, color=color, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("features")
    axes.set_ylabel("counted")
    axes.grid(linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return {"effective_features": figure}
