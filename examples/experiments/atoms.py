"""How alike atoms are: those that an autoencoder has learnt, and the neurons of the model that it reads.

An atom's coherence mu is its largest absolute cosine with another; K atoms below 1 / (2 K - 1) are the only K
that make what they make. Here a TopK autoencoder is trained on a small language model's middle layer (of
`make demo`); the neurons are those whose outputs the layer before it adds up. Both are compared under the
usual inner product and under the one that the activations suggest, and both with as many random directions.

Sources: arXiv 2509.20784 (the atomic inner product); Donoho and Elad 2003 (uniqueness).
"""

from typing import Any

import torch
from torch import Tensor

from examples.experiments.encoders import FULL, QUICK, RATE, activations, stream
from examples.experiments.training import seeded, train
from fastsparse.diagnostics import atomic_metric, coherence, largest_unique_support, uniqueness_fraction
from fastsparse.nn import TopKSAE

SUPPORTS = (2, 3, 4)
COLORS = {"autoencoder": "C0", "neurons": "C1", "random": "C7"}


def run(*, quick: bool = False) -> dict[str, Any]:
    sizes = QUICK if quick else FULL
    if quick:
        learning, neurons = (torch.randn(count, 16, generator=seeded(count)) for count in (800, 40))
    else:
        learning, _ = activations()
        neurons = minilm_neurons()
    D, k = learning.shape[1], min(32, sizes.M // 8)
    sae = TopKSAE(D, sizes.M, k, generator=seeded(3), dead_after=100 * sizes.batch)
    sae.init_decoder_bias_(learning[: sizes.batch * 8])
    train(sae, stream(learning, sizes.batch, 0), steps=sizes.steps, lr=RATE)
    with torch.no_grad():
        values = sae.encode(learning[: sizes.batch * 8]).values
    counts = (values > 0).sum(dim=1)
    dictionaries = {
        "autoencoder": sae.W_dec.detach()[~sae.dead],
        "neurons": neurons,
        "random": torch.randn(sizes.M, D, generator=seeded(4)),
    }
    metrics = {"usual": None, "atomic": atomic_metric(learning)}
    return {
        "sizes": {"M": sizes.M, "D": D, "k": k, "steps": sizes.steps, "tokens": len(learning)},
        "dictionaries": [
            {"atoms": name, "product": product, **described(atoms, metric, counts)}
            for name, atoms in dictionaries.items()
            for product, metric in metrics.items()
        ],
    }


def minilm_neurons() -> Tensor:
    """(1536, 384): what each neuron of the third layer's feed-forward network adds to the activations."""
    from transformers import AutoModel

    from examples.demo.__main__ import LAYER, minilm

    model = AutoModel.from_pretrained(minilm())
    return model.encoder.layer[LAYER - 1].output.dense.weight.detach().T.contiguous()


def described(atoms: Tensor, metric: Tensor | None, counts: Tensor) -> dict[str, Any]:
    found = coherence(atoms, metric)
    steps = torch.linspace(0, 1, 51)
    return {
        "count": len(atoms),
        "mutual": float(found.mutual),
        "unique": [float((largest_unique_support(found.per_atom) >= K).double().mean()) for K in SUPPORTS],
        "fraction": uniqueness_fraction(found.per_atom, counts),
        "quantiles": torch.quantile(found.per_atom.double(), steps.double()).tolist(),
    }


# ---- what came out ----


def table(result: dict[str, Any]) -> str:
    """As Markdown."""
    shares = " | ".join(f"unique at K = {K}" for K in SUPPORTS)
    lines = [
        f"| atoms | inner product | number | largest mu | median mu | {shares} |",
        "|---|---|---:|---:|---:|" + "---:|" * len(SUPPORTS),
    ]
    for record in result["dictionaries"]:
        unique = " | ".join(f"{share:.1%}" for share in record["unique"])
        lines.append(
            f"| {record['atoms']} | {record['product']} | {record['count']:,} | {record['mutual']:.3f} | "
            f"{record['quantiles'][25]:.3f} | {unique} |"
        )
    return "\n".join(lines)


def draw(result: dict[str, Any], pyplot: Any) -> dict[str, Any]:
    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    for record in result["dictionaries"]:
        quantiles = record["quantiles"]
        axes.plot(
            quantiles, [i / (len(quantiles) - 1) for i in range(len(quantiles))],
            color=COLORS[record["atoms"]], linestyle="-" if record["product"] == "usual" else "--",
            label=f"{record['atoms']}, {record['product']}",
        )  # fmt: skip
    for K in SUPPORTS:
        axes.axvline(1 / (2 * K - 1), color="0.8", linewidth=0.6, zorder=0)
        axes.annotate(f"K = {K}", (1 / (2 * K - 1), 1.02), ha="center", annotation_clip=False, color="0.5")
    axes.set_xlim(0, 1)
    axes.set_xlabel("an atom's largest absolute cosine with another")
    axes.set_ylabel("share of atoms with no larger one")
    axes.grid(linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return {"atoms": figure}
