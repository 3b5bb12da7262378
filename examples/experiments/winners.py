"""Are alike inputs given alike codes by modules in which the winner takes all?

Q modules of K cells; in each the cell of the largest score wins: a TopK encoder with groups. Inputs are sets
of A of D bits. Cells' weights are binary and set once: a bit's weight is 1 as soon as the bit has been active
in an input for which the cell was a winner. Winners of inputs that are stored are drawn by lot, as
Sparsey draws them when an input is wholly unfamiliar; reading has no noise here. Random weights, which have
learnt nothing, are beside them.

Inputs are made that share a known number of bits with another; how many winners their codes share is
measured.

Source: Rinkus 2014, "Sparsey: event recognition via deep hierarchical sparse distributed codes", Frontiers in
Computational Neuroscience 8:160.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastsparse
from examples.experiments.training import seeded
from fastsparse import TopK
from fastsparse.metrics import hamming, support_bits


class Sizes(NamedTuple):
    D: int  # bits
    A: int  # of these, active
    Q: int  # modules
    K: int  # cells of each
    stored: tuple[int, ...]
    bases: int  # inputs that others are compared with
    variants: int  # of each, at every overlap
    levels: int  # of overlap, from none to all


FULL = Sizes(D=256, A=32, Q=64, K=16, stored=(64, 256, 1024), bases=64, variants=8, levels=17)
QUICK = Sizes(D=32, A=8, Q=6, K=4, stored=(4,), bases=4, variants=2, levels=5)


def run(*, quick: bool = False) -> dict[str, Any]:
    sizes = QUICK if quick else FULL
    random = torch.randn(sizes.Q * sizes.K, sizes.D, generator=seeded(1))
    curves = [curve("random weights", 0, random, sets(sizes.bases, sizes, seeded(2)), sizes)]
    for count in sizes.stored:
        stored = sets(count, sizes, seeded(3, count))
        weight = learnt(stored, lots(count, sizes, seeded(4, count)), sizes)
        curves.append(curve("around stored inputs", count, weight, stored[: sizes.bases], sizes))
        curves.append(curve("around others", count, weight, sets(sizes.bases, sizes, seeded(2)), sizes))
    return {"sizes": sizes._asdict(), "curves": curves}


def sets(count: int, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """(count, D) of zeros, and A ones each, drawn at random."""
    order = torch.rand(count, sizes.D, generator=generator).argsort(dim=1)
    return (order < sizes.A).float()


def sharing(base: Tensor, shared: int, count: int, generator: torch.Generator) -> Tensor:
    """(count, D): inputs with as many active bits as base (D,), ``shared`` of them in common with it."""
    active = int(base.sum())
    chance = torch.rand(count, len(base), generator=generator)
    kept = (chance + base).argsort(dim=1, descending=True)[:, :active]  # the base's bits, in any order
    moved = (chance - base).argsort(dim=1, descending=True)[:, : active - shared]  # and others
    return torch.zeros(count, len(base)).scatter(1, torch.cat((kept[:, :shared], moved), dim=1), 1.0)


def lots(count: int, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """(count, Q): a cell of every module, drawn by lot."""
    cells = torch.randint(sizes.K, (count, sizes.Q), generator=generator)
    return cells + sizes.K * torch.arange(sizes.Q)


def learnt(inputs: Tensor, winners: Tensor, sizes: Sizes) -> Tensor:
    """(Q K, D): 1 where the bit was ever active while the cell won."""
    return (fastsparse.spmm_t(torch.ones(winners.shape), winners, inputs, sizes.Q * sizes.K) > 0).float()


def codes(inputs: Tensor, weight: Tensor, sizes: Sizes) -> Tensor:
    """The winners' sets as bits; of cells that score alike the first wins."""
    winners = fastsparse.topk_encode(inputs, weight, k=1, groups=sizes.Q, activation="none").indices
    return support_bits(TopK(torch.ones(winners.shape), winners), len(weight))


def curve(weights: str, stored: int, weight: Tensor, bases: Tensor, sizes: Sizes) -> dict[str, Any]:
    """The share of winners that codes have in common, at every overlap of inputs."""
    generator = seeded(5)
    levels = torch.linspace(0, sizes.A, sizes.levels).round().long().tolist()
    shares = torch.empty(len(levels), len(bases), sizes.variants)
    for i, base in enumerate(bases):
        code = codes(base[None], weight, sizes)
        for j, shared in enumerate(levels):
            others = codes(sharing(base, shared, sizes.variants, generator), weight, sizes)
            shares[j, i] = 1 - hamming(code, others)[0] / (2 * sizes.Q)
    overlaps = torch.tensor(levels).view(-1, 1, 1).expand_as(shares)
    return {
        "weights": weights, "stored": stored, "density": (weight > 0).double().mean().item(),
        "overlap": [shared / sizes.A for shared in levels], "shared": shares.mean(dim=(1, 2)).tolist(),
        "rank_correlation": rank_correlation(overlaps.flatten(), shares.flatten()),
    }  # fmt: skip


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's: the correlation of ranks, those of equal values being their mean."""
    return float(torch.corrcoef(torch.stack((ranks(a), ranks(b))))[0, 1])


def ranks(values: Tensor) -> Tensor:
    _, places, counts = torch.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[places]


# ---- what came out ----


def table(result: dict[str, Any]) -> str:
    """As Markdown."""
    shown = [0, 0.25, 0.5, 0.75, 1]
    lines = [
        f"| codes | stored | weights set | rank correlation | {' | '.join(f'at {x:.0%}' for x in shown)} |",
        "|---|---:|---:|---:|" + "---:|" * len(shown),
    ]
    for record in result["curves"]:
        at = dict(zip(record["overlap"], record["shared"], strict=True))
        cells = " | ".join(f"{at[x]:.1%}" for x in shown)
        stored, density = (
            (f"{record['stored']:,}", f"{record['density']:.1%}") if record["stored"] else ("none", "all")
        )
        lines.append(
            f"| {record['weights']} | {stored} | {density} | {record['rank_correlation']:.3f} | {cells} |"
        )
    return "\n".join(lines)


def draw(result: dict[str, Any], pyplot: Any) -> dict[str, Any]:
    figure, axes = pyplot.subplots(figsize=(5, 3.4), layout="constrained")
    counts = result["sizes"]["stored"]
    for record in result["curves"]:
        known = record["weights"] == "around stored inputs"
        color = f"C{counts.index(record['stored'])}" if record["stored"] else "0.4"
        label = record["weights"] + (f", {record['stored']:,} stored" if record["stored"] else "")
        axes.plot(
            record["overlap"], record["shared"], color=color, label=label,
            linestyle="-" if known or not record["stored"] else "--",
        )  # fmt: skip
    axes.axhline(1 / result["sizes"]["K"], color="0.5", linewidth=0.6, linestyle=":", zorder=0)
    axes.set_xlabel("share of active bits in common")
    axes.set_ylabel("share of winners in common")
    axes.grid(linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return {"winners": figure}
