"""What a polynomial decoder finds of features that act together.

Features are random directions; an input is the sum of a few, and of some known pairs, where both features are
active, also the product of their values along the pair's own direction. Pairs that interact are active
together as often as all others: nothing but the product tells them apart. A TopK autoencoder with a
polynomial decoder is compared with linear ones of equal k, one with as many latents and one with as many
parameters. Latents are matched to features by cosine, pairs ranked by how strongly their latents interact.

A training step at the sizes of the paper is timed beside that of a linear decoder.

Source: Koromilas et al. 2026, "PolySAE", arXiv 2602.01322; the task is ours.
One rate for all. The first seed, on which the task was tried, is not shown.
"""

import itertools
import time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastsparse
from examples.experiments.effective_features import samples
from examples.experiments.levels import matched
from examples.experiments.training import seeded, train
from fastsparse.nn import TopKSAE, fvu

RATE = 1e-2
COLORS = {"polynomial": "C1", "linear": "C0", "linear, as many parameters": "C2"}
NOISE = 0.02  # standard deviation of a channel
FOUND = 0.9  # the cosine from which on a direction counts as found


class Sizes(NamedTuple):
    D: int
    M: int
    features: int
    active: int
    pairs: int  # that interact
    ranks: tuple[int, int, int]
    ks: tuple[int, ...]
    seeds: int
    steps: int
    batch: int
    held_out: int


class Step(NamedTuple):
    """A training step that is timed."""

    N: int
    D: int
    M: int
    k: int
    ranks: tuple[int, int, int]
    repeats: int


FULL = Sizes(64, 64, 32, 6, 32, (64, 64, 64), (6,), seeds=3, steps=1500, batch=512, held_out=16384)
QUICK = Sizes(8, 8, 4, 2, 2, (8, 8, 8), (2,), seeds=1, steps=3, batch=32, held_out=64)
FULL_STEP = Step(2048, 768, 16384, 64, (768, 64, 64), repeats=5)
QUICK_STEP = Step(16, 8, 16, 2, (8, 4, 4), repeats=1)


class World(NamedTuple):
    directions: Tensor  # (features, D)
    pairs: Tensor  # (2, P), all there are
    interacts: Tensor  # (P,) bool
    joint: Tensor  # (pairs that interact, D), their directions

    def show(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Inputs (N, D) of features' values z (N, features)."""
        first, second = self.pairs[:, self.interacts]
        clean = z @ self.directions + (z[:, first] * z[:, second]) @ self.joint
        return clean + NOISE * torch.randn(clean.shape, generator=generator)


def world(sizes: Sizes, seed: int) -> World:
    generator = seeded(1, seed)
    directions = F.normalize(torch.randn(sizes.features, sizes.D, generator=generator))
    joint = F.normalize(torch.randn(sizes.pairs, sizes.D, generator=generator))
    pairs = torch.combinations(torch.arange(sizes.features)).T
    interacts = torch.zeros(pairs.shape[1], dtype=torch.bool)
    interacts[torch.randperm(pairs.shape[1], generator=generator)[: sizes.pairs]] = True
    return World(directions, pairs, interacts, joint)


def run(*, quick: bool = False) -> dict[str, Any]:
    sizes, step = (QUICK, QUICK_STEP) if quick else (FULL, FULL_STEP)
    shown = range(sizes.seeds) if quick else range(1, 1 + sizes.seeds)
    return {
        "sizes": sizes._asdict(), "rate": RATE, "step_sizes": step._asdict(),
        "runs": [trained(kind, k, seed, sizes) for k in sizes.ks for kind in COLORS for seed in shown],
        "step": overhead(step),
    }  # fmt: skip


def model(kind: str, k: int, seed: int, sizes: Sizes) -> TopKSAE:
    options = {"dead_after": 100 * sizes.batch, "generator": seeded(2, seed)}
    if kind == "polynomial":
        return TopKSAE(sizes.D, sizes.M, k, decoder="polynomial", ranks=sizes.ranks, **options)
    if kind == "linear":
        return TopKSAE(sizes.D, sizes.M, k, **options)
    R1, R2, R3 = sizes.ranks
    extra = (sizes.M * (R1 - sizes.D) + sizes.D * (R1 + R2 + R3)) // (2 * sizes.D + 1)
    return TopKSAE(sizes.D, sizes.M + extra, k, **options)


def trained(kind: str, k: int, seed: int, sizes: Sizes, rate: float = RATE) -> dict[str, Any]:
    here, stream = world(sizes, seed), seeded(3, seed)

    def values(count: int, generator: torch.Generator) -> Tensor:
        return samples(count, sizes.features, sizes.active, generator).to_dense(sizes.features)

    sae = model(kind, k, seed, sizes)
    train(
        sae, lambda: here.show(values(sizes.batch, stream), stream), steps=sizes.steps,
        lr=rate,
    )  # fmt: skip
    held_out = seeded(4, seed)
    x = here.show(values(sizes.held_out, held_out), held_out)
    with torch.no_grad():
        code = sae.encode(x)
        record = {
            "decoder": kind, "k": k, "seed": seed, "fvu": float(fvu(sae.decode(code), x)),
            "parameters": sum(parameter.numel() for parameter in sae.parameters()),
        }  # fmt: skip
        typical = mean_values(code, sae.num_latents)
        atoms = alone(sae, typical)
        record["features_found"] = found(here.directions, atoms)
        if kind == "polynomial":
            record |= recovered(sae, here, atoms, typical)
        else:
            record["joint_found"] = found(here.joint, atoms)
    return record


def mean_values(code: fastsparse.TopK, M: int) -> Tensor:
    """(M,): what a latent is on average where it is active."""
    entries = code.indices.flatten()[code.values.flatten() > 0]
    sums = torch.zeros(M).index_add_(0, code.indices.flatten(), code.values.flatten())
    return sums / torch.bincount(entries, minlength=M).clamp_min(1)


def alone(sae: TopKSAE, typical: Tensor) -> Tensor:
    """(M, D), of norm 1: what each latent adds on its own, at its typical value."""
    latents = torch.arange(sae.num_latents).unsqueeze(1)
    return F.normalize(sae.decode(fastsparse.TopK(typical.unsqueeze(1), latents)) - sae.b_dec)


def found(directions: Tensor, atoms: Tensor) -> float:
    return float(((directions @ atoms.T).amax(dim=1) > FOUND).double().mean())


def recovered(sae: TopKSAE, here: World, atoms: Tensor, typical: Tensor) -> dict[str, Any]:
    """How well the interaction's norm, at typical values, tells pairs that interact from all others."""
    latents = matched(here.directions @ atoms.T)
    first, second = latents[here.pairs]
    vectors = sae.pair_interactions(first, second) * (typical[first] * typical[second]).unsqueeze(1)
    strengths = vectors.norm(dim=1)
    top = strengths.topk(int(here.interacts.sum())).indices
    return {
        "auc": auc(strengths[here.interacts], strengths[~here.interacts]),
        "precision": here.interacts[top].double().mean().item(),
        "cosine": F.cosine_similarity(vectors[here.interacts], here.joint).mean().item(),
        "strengths": {
            "interact": strengths[here.interacts].tolist(), "others": strengths[~here.interacts].tolist(),
        },
    }  # fmt: skip


def auc(positive: Tensor, negative: Tensor) -> float:
    """The chance that one of the first is above one of the second; equal ones count half.

    Example:
        >>> auc(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0]))
        0.875
    """
    differences = positive.unsqueeze(1) - negative
    return ((differences > 0).double() + (differences == 0).double() / 2).mean().item()


# ---- what a step costs ----


def overhead(sizes: Step) -> dict[str, list[float]]:
    """Milliseconds of training steps that take turns; the retraction to orthonormal columns on its own."""
    x = torch.randn(sizes.N, sizes.D, generator=seeded(1))
    models = {
        "linear": TopKSAE(sizes.D, sizes.M, sizes.k, generator=seeded(2)),
        "polynomial": TopKSAE(
            sizes.D, sizes.M, sizes.k, decoder="polynomial", ranks=sizes.ranks, generator=seeded(2)
        ),
    }
    optimizers = {
        kind: torch.optim.Adam(sae.parameters(), lr=1e-5, fused=True) for kind, sae in models.items()
    }
    times: dict[str, list[float]] = {f"{kind}, {part}": [] for kind in models for part in ("step", "after")}
    for turn, kind in itertools.product(range(sizes.repeats + 1), models):
        sae, optimizer = models[kind], optimizers[kind]
        begun = time.perf_counter()
        optimizer.zero_grad()
        sae.loss(x).loss.backward()
        sae.after_backward_()
        optimizer.step()
        between = time.perf_counter()
        sae.after_step_()
        ended = time.perf_counter()
        if turn:  # the first warms up
            times[f"{kind}, step"].append(1e3 * (between - begun))
            times[f"{kind}, after"].append(1e3 * (ended - between))
    return times


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Medians over turns: of a whole step, and without what comes after it."""
    linear, polynomial = (
        torch.tensor([times[f"{kind}, step"], times[f"{kind}, after"]]) for kind in ("linear", "polynomial")
    )
    return {
        "whole": (polynomial.sum(0) / linear.sum(0)).median().item(),
        "without retraction": (polynomial[0] / linear[0]).median().item(),
    }  # fmt: skip


# ---- what came out ----


def table(result: dict[str, Any]) -> str:
    """Means over seeds, with the least and the largest, as Markdown."""
    lines = [
        "| decoder | k | parameters | FVU | features found | AUC of pairs | precision | cosine |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (kind, k), runs in grouped(result).items():
        cells = [spread(runs, "fvu", 4), f"{sum(r['features_found'] for r in runs) / len(runs):.0%}"]
        cells += [spread(runs, key, 2) if key in runs[0] else "" for key in ("auc", "precision", "cosine")]
        lines.append(f"| {kind} | {k} | {runs[0]['parameters']:,} | {' | '.join(cells)} |")
    lines += ["", "| a training step, polynomial against linear | times |", "|---|---:|"]
    lines += [f"| {part} | {ratio:.2f} |" for part, ratio in ratios(result["step"]).items()]
    return "\n".join(lines)


def spread(runs: list[dict[str, Any]], key: str, digits: int) -> str:
    values = [run[key] for run in runs]
    mean, least, most = (
        f"{value:.{digits}f}" for value in (sum(values) / len(values), min(values), max(values))
    )
    return f"{mean} ({least} to {most})"


def grouped(result: dict[str, Any]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in result["runs"]:
        groups.setdefault((record["decoder"], record["k"]), []).append(record)
    return groups


def draw(result: dict[str, Any], pyplot: Any) -> dict[str, Any]:
    """FVU by k, and the strengths of the first seed's pairs at the least k, in order."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(7, 3), layout="constrained")
    ks = result["sizes"]["ks"]
    for (kind, k), runs in grouped(result).items():
        left.plot(
            [ks.index(k) + 0.2 * (list(COLORS).index(kind) - 1)] * len(runs), [run["fvu"] for run in runs],
            "o", markersize=3, color=COLORS[kind], label=kind if k == ks[0] else None,
        )  # fmt: skip
    left.set_xticks(range(len(ks)), [str(k) for k in ks])
    left.set_xlabel("latents an input (k)")
    left.set_ylabel("variance unexplained (FVU)")
    left.set_ylim(0)
    left.legend(frameon=False)
    strengths = next(run["strengths"] for run in result["runs"] if "strengths" in run)
    ordered = sorted(
        ((value, group) for group, values in strengths.items() for value in values), reverse=True
    )
    for group, color in (("others", "0.7"), ("interact", "C1")):
        places = [(i, value) for i, (value, of) in enumerate(ordered) if of == group]
        right.plot(*zip(*places, strict=True), "o", markersize=2.5, color=color, label=group)
    right.set_xlabel("pairs of features, in order")
    right.set_ylabel("strength of interaction")
    right.legend(frameon=False)
    for each in (left, right):
        each.grid(linewidth=0.3)
        each.spines[["top", "right"]].set_visible(False)
    return {"interactions": figure}
