"""Whether masks and a group's norm make two views share their latents: dead ones, and those of both views.

The two views are the activations of one small language model (of `make demo`) on the same tokens, two layers
apart. Three autoencoders of the pair are trained alike, three seeds each: plain TopK of each view; with a
random mask of latents, one for both views of a token; and with the mask and the group's norm as a penalty.
The paper's mask keeps .8 of the latents, and its weight is .05 of squared errors: here the same, in the unit
of the fvu. Dead latents aren't revived. Everything is counted on held-out tokens.

Source: arXiv 2601.20028 (there: images and their captions).
"""

from typing import Any

import torch
from torch import Tensor

from examples.experiments.encoders import FULL, QUICK, activations, stream
from examples.experiments.training import seeded, train
from fastsparse.nn import GroupSparseSAE, fvu

VIEWS = ("encoder.layer.1", "encoder.layer.3")
K, RATE = 32, 4e-3
WEIGHT = 0.05  # of squared errors
KINDS = {"plain": (0.0, 0.0), "masked": (0.2, 0.0), "masked, group": (0.2, WEIGHT)}
COLORS = {"plain": "C0", "masked": "C1", "masked, group": "C2"}


def run(*, quick: bool = False) -> dict[str, Any]:
    sizes = QUICK if quick else FULL
    if quick:
        rows = torch.randn(1000, 2, 16, generator=seeded(1))
        learning, validation = rows[200:], rows[:200]
    else:
        views = [activations(view) for view in VIEWS]
        learning, validation = (torch.stack(side, dim=1) for side in zip(*views, strict=True))
    variance = float((learning - learning.mean(dim=0)).square().sum(dim=(1, 2)).mean())
    return {
        "sizes": {
            **sizes._asdict(),
            "D": learning.shape[2],
            "k": min(K, sizes.M // 8),
            "tokens": len(learning),
        },
        "variance": variance,
        "trained": [
            scored(kind, seed, learning, validation, variance, sizes)
            for seed in range(sizes.seeds)
            for kind in KINDS
        ],
    }


def scored(
    kind: str, seed: int, learning: Tensor, validation: Tensor, variance: float, sizes: Any
) -> dict[str, Any]:
    probability, weight = KINDS[kind]
    model = GroupSparseSAE(
        learning.shape[2], sizes.M, min(K, sizes.M // 8), num_modalities=2, mask_probability=probability,
        group_weight=weight / variance, aux_k=0, mask_seed=seed, generator=seeded(2, seed),
    )  # fmt: skip
    model.init_decoder_bias_(learning[: sizes.batch * 8])
    model = train(model, stream(learning, sizes.batch, seed), steps=sizes.steps, lr=RATE)
    with torch.no_grad():
        codes = model.encode(validation)
        explained = fvu(model.decode(codes).flatten(1), validation.flatten(1))
        return {"kind": kind, "seed": seed, "fvu": float(explained), **shared(codes, sizes.M)}


def shared(codes: Any, M: int) -> dict[str, float]:
    """How many latents are in use by none, one and both views, and how much of tokens' codes views share."""
    active = torch.stack([code.to_dense(M) > 0 for code in codes])
    used = active.any(dim=1).sum(dim=0)
    both, either = active.all(dim=0).sum(dim=1), active.any(dim=0).sum(dim=1)
    return {
        "dead": int((used == 0).sum()), "one": int((used == 1).sum()), "both": int((used == 2).sum()),
        "overlap": float((both / either.clamp_min(1)).mean()),
    }  # fmt: skip


# ---- what came out ----


def table(result: dict[str, Any]) -> str:
    """Every seed's counts, as Markdown."""
    lines = [
        "| autoencoders | dead latents | of one view | of both views | shared by a token's views | FVU |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for kind in KINDS:
        records = [record for record in result["trained"] if record["kind"] == kind]
        counts = " | ".join(", ".join(f"{r[name]:,}" for r in records) for name in ("dead", "one", "both"))
        overlap = ", ".join(f"{record['overlap']:.1%}" for record in records)
        fvus = ", ".join(f"{record['fvu']:.4f}" for record in records)
        lines.append(f"| {kind} | {counts} | {overlap} | {fvus} |")
    return "\n".join(lines)


def draw(result: dict[str, Any], pyplot: Any) -> dict[str, Any]:
    figure, panels = pyplot.subplots(1, 3, figsize=(7, 2.6), layout="constrained")
    for axes, (name, title) in zip(
        panels,
        {
            "dead": "dead latents",
            "both": "latents of both views",
            "overlap": "of a token's latents shared",
        }.items(),
        strict=True,
    ):
        for place, (kind, color) in enumerate(COLORS.items()):
            values = [record[name] for record in result["trained"] if record["kind"] == kind]
            axes.bar(place, sum(values) / len(values), color=color, alpha=0.4)
            axes.plot([place] * len(values), values, "o", color=color, markersize=3)
        axes.set_xticks(range(len(COLORS)), [kind.replace(", ", ",\n") for kind in COLORS])
        axes.set_title(title, fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    return {"modalities": figure}
