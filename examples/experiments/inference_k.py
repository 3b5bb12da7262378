"""Reconstruction against the number of latents at inference, for autoencoders trained at one k.

Samples are sums of a few atoms of a random dictionary, some of more and some of fewer, and a little noise.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from examples.experiments.training import Autoencoder, TopK, best, seeded, unexplained
from fastsparse.nn import MatchingPursuitSAE, fvu

D, M, K = 64, 256, 8
NOISE = 0.02
RATES = (3e-3, 1e-2)
TOLERANCES = (0.1, 0.2, 0.4, 0.6, 0.8, 1.2)  # where the norms of samples are about 3.5
STYLES = {
    "MP-SAE": ("C0", "-"),
    "MP-SAE, by tolerance": ("C0", ":"),
    "TopK SAE": ("C1", "-"),
    "tied TopK SAE": ("C2", "-"),
    "TopK SAE, trained at each k": ("C1", ":"),
}


class Sizes(NamedTuple):
    seeds: int
    steps: int
    batch: int
    samples: int
    counts: tuple[int, ...]  # of latents at inference
    retrained: tuple[int, ...]  # of these, for which a TopK SAE of its own is trained


FULL = Sizes(2, 1500, 512, 4096, (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64), (2, 4, 16, 32))
QUICK = Sizes(1, 20, 64, 256, (1, 2, 8, 32), (2,))


def run(*, quick: bool = False) -> dict[str, Any]:
    sizes = QUICK if quick else FULL
    curves = [curve for seed in range(sizes.seeds) for curve in measured(seed, sizes)]
    return {"sizes": {**sizes._asdict(), "D": D, "M": M, "k": K}, "rates": RATES, "curves": curves}


def samples(atoms: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, D): of every atom with probability K / M an exponential amplitude of mean 1; and noise."""
    active = torch.rand(count, M, generator=generator) < K / M
    amplitudes = torch.empty(count, M).exponential_(generator=generator)
    return (active * amplitudes) @ atoms + NOISE * torch.randn(count, D, generator=generator)


def measured(seed: int, sizes: Sizes) -> list[dict[str, Any]]:
    """Curves of FVU over the mean number of latents."""
    atoms = torch.randn(M, D, generator=seeded(0, seed))
    atoms /= torch.linalg.vector_norm(atoms, dim=1, keepdim=True)
    validation, held_out = (samples(atoms, sizes.samples, seeded(part, seed)) for part in (1, 2))

    def trained(kind: type, k: int, **options) -> tuple[Autoencoder, float]:
        def batch():
            stream = seeded(4, seed)
            return lambda: samples(atoms, sizes.batch, stream)

        def make():
            return kind(D, M, k, dead_after=20 * sizes.batch, generator=seeded(3, seed), **options)

        return best(make, batch, validation, rates=RATES, steps=sizes.steps)

    curves = []
    pursuit, rate = trained(MatchingPursuitSAE, K)
    for name, (sae, its_rate) in {
        "MP-SAE": (pursuit, rate),
        "TopK SAE": (top_k := trained(TopK, K)),
        "tied TopK SAE": trained(TopK, K, tied=True),
    }.items():
        errors = [unexplained(sae, held_out, k) for k in sizes.counts]
        curves.append({"seed": seed, "model": name, "rate": its_rate, "k": sizes.counts, "fvu": errors})
    counts, errors = by_tolerance(pursuit, held_out, sizes.counts[-1])
    curves.append(
        {"seed": seed, "model": "MP-SAE, by tolerance", "rate": rate, "tolerances": TOLERANCES, "k": counts,
         "fvu": errors}
    )  # fmt: skip
    own = {k: trained(TopK, k) for k in sizes.retrained} | {K: top_k}
    curves.append(
        {"seed": seed, "model": "TopK SAE, trained at each k", "rate": [own[k][1] for k in sorted(own)],
         "k": sorted(own), "fvu": [unexplained(own[k][0], held_out, k) for k in sorted(own)]}
    )  # fmt: skip
    return curves


@torch.no_grad()
def by_tolerance(sae: MatchingPursuitSAE, x: Tensor, most: int) -> tuple[list[float], list[float]]:
    """The mean number of steps and the FVU for each tolerance."""
    counts, errors = [], []
    for tolerance in TOLERANCES:
        code = sae.encode(x, k=most, tol=tolerance)
        counts.append(float((code.values != 0).sum(dim=1).double().mean()))
        errors.append(float(fvu(sae.decode(code), x)))
    return counts, errors


def table(result: dict[str, Any]) -> str:
    """Means over seeds, as Markdown."""
    counts = result["sizes"]["counts"]
    lines = [f"| FVU at k | {' | '.join(map(str, counts))} |", "|---|" + "---:|" * len(counts)]
    for model in STYLES:
        if model == "MP-SAE, by tolerance":
            continue
        curves = [dict(zip(c["k"], c["fvu"], strict=True)) for c in result["curves"] if c["model"] == model]
        cells = [
            f"{sum(curve[k] for curve in curves) / len(curves):.4f}" if k in curves[0] else "" for k in counts
        ]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    lines.append("")
    for curve in result["curves"]:
        if curve["model"] == "MP-SAE, by tolerance":
            pairs = zip(curve["k"], curve["fvu"], strict=True)
            lines.append(
                f"- by tolerance, seed {curve['seed']}: {', '.join(f'{k:.2f}: {e:.4f}' for k, e in pairs)}"
            )
    return "\n".join(lines)


def draw(result: dict[str, Any], pyplot: Any) -> dict[str, Any]:
    figure, axes = pyplot.subplots(figsize=(5.5, 3.6), layout="constrained")
    for curve in result["curves"]:
        color, dashes = STYLES[curve["model"]]
        label = curve["model"] if curve["seed"] == 0 else None
        axes.plot(curve["k"], curve["fvu"], dashes, marker="o", markersize=3, color=color, label=label)
    counts = result["sizes"]["counts"]
    axes.axvline(result["sizes"]["k"], color="0.5", linewidth=0.6, zorder=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(counts, counts)
    axes.minorticks_off()
    axes.set_xlabel(f"latents a sample at inference (trained at {result['sizes']['k']}, the grey line)")
    axes.set_ylabel("FVU on held-out samples")
    axes.grid(linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return {"inference_k": figure}
