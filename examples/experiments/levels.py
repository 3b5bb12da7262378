"""Hierarchical levels: which encoder finds the atoms that a sample was made of?

Four mutually orthogonal levels of 8 dimensions hold 64 atoms each; a sample is one atom of every level, with
amplitudes from 1 to 2. The atoms of a level resemble one another as much as we choose: a unit vector at
random plus ``pull`` times one that they share, at norm 1. First the encoders are given the true dictionary,
then autoencoders have to learn it.

Source: the hierarchical experiments of Costa et al. 2025, arXiv 2506.03093, section 4, at our own sizes.
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastsparse
from examples.experiments.training import Autoencoder, TopK, seeded, train
from fastsparse.nn import MatchingPursuitSAE, fvu

LEVELS, WIDTH, ATOMS = 4, 8, 64
D, M = LEVELS * WIDTH, LEVELS * ATOMS
PULLS = (0.0, 0.4, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0, 10.0)
TRAINED_PULLS = (0.0, 1.0, 3.0)
COLORS = {"matching pursuit": "C0", "tied Top-k": "C2", "pseudo-inverse Top-k": "C3", "search": "0.5"}
MODELS = {"MP-SAE": "C0", "TopK SAE": "C1", "tied TopK SAE": "C2"}
# For each model the best FVU on another dictionary at pull 1, of 3e-4, 1e-3, 3e-3, 1e-2 and (not tied) 2e-2.
RATES = {"MP-SAE": 2e-2, "TopK SAE": 1e-2, "tied TopK SAE": 1e-2}
FOUND = 0.99  # the cosine from which a learnt atom counts as the true one


class Sizes(NamedTuple):
    """How much is done: dictionaries and samples for the true dictionary, and for what is trained."""

    draws: int
    samples: int
    searched: int
    seeds: int
    steps: int
    batch: int


FULL = Sizes(draws=3, samples=4000, searched=500, seeds=3, steps=2000, batch=512)
QUICK = Sizes(draws=2, samples=1500, searched=100, seeds=1, steps=15, batch=64)


def run(*, quick: bool = False) -> dict[str, Any]:
    sizes = QUICK if quick else FULL
    return {
        "sizes": {**sizes._asdict(), "levels": LEVELS, "width": WIDTH, "atoms": ATOMS},
        "rates": RATES,
        "true_dictionary": [
            true_dictionary(pull, draw, sizes) for pull in PULLS for draw in range(sizes.draws)
        ],
        "trained": [
            found
            for pull in TRAINED_PULLS
            for seed in range(sizes.seeds)
            for found in trained(pull, seed, sizes)
        ],
    }


# ---- the data ----


def dictionary(pull: float, generator: torch.Generator) -> Tensor:
    """(M, D), atoms of norm 1; level l is rows 64 l to 64 l + 63. No level lies along the axes."""
    atoms = torch.zeros(M, D)
    for level in range(LEVELS):
        shared = _unit(torch.randn(1, WIDTH, generator=generator))
        own = _unit(torch.randn(ATOMS, WIDTH, generator=generator))
        rows, columns = slice(level * ATOMS, (level + 1) * ATOMS), slice(level * WIDTH, (level + 1) * WIDTH)
        atoms[rows, columns] = _unit(own + pull * shared)
    rotation, _ = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64))
    return (atoms.double() @ rotation).float()


def sibling_cosine(atoms: Tensor) -> float:
    """The mean cosine of two different atoms of one level."""
    levels = atoms.view(LEVELS, ATOMS, D)
    total = levels.sum(dim=1).square().sum() - M  # of w.v over ordered pairs
    return float(total / (M * (ATOMS - 1)))


def samples(
    atoms: Tensor, count: int, generator: torch.Generator, *, twins: bool = False
) -> tuple[Tensor, Tensor]:
    """x (count, D) and its atoms, ascending: one of every level; of the first two if ``twins``."""
    chosen = torch.randint(ATOMS, (count, LEVELS), generator=generator)
    support = chosen + ATOMS * torch.arange(LEVELS)
    if twins:
        other = (chosen[:, :1] + torch.randint(1, ATOMS, (count, 1), generator=generator)) % ATOMS
        support = torch.cat([other, support], dim=1).sort(dim=1).values
    amplitudes = 1 + torch.rand(support.shape, generator=generator)
    return fastsparse.spmm(amplitudes, support, atoms), support


def _unit(rows: Tensor) -> Tensor:
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)


# ---- with the true dictionary ----


def true_dictionary(pull: float, draw: int, sizes: Sizes) -> dict[str, Any]:
    """How often each encoder finds exactly the atoms that a sample was made of."""
    generator = seeded(PULLS.index(pull), draw)
    atoms = dictionary(pull, generator)
    record: dict[str, Any] = {"pull": pull, "draw": draw, "sibling_cosine": sibling_cosine(atoms)}
    for name, twins in (("one a level", False), ("two of one level", True)):
        x, support = samples(atoms, sizes.samples, generator, twins=twins)
        k = support.shape[1]
        inverse = torch.linalg.pinv(atoms.double()).T.float()
        encoders = {
            "matching pursuit": fastsparse.matching_pursuit(x, atoms, k=k, nonnegative=True, normalized=True),
            "tied Top-k": fastsparse.topk_encode(x, atoms, k=k),
            "pseudo-inverse Top-k": fastsparse.topk_encode(x, inverse, k=k),
        }
        found = {encoder: _exact(code.indices, support) for encoder, code in encoders.items()}
        if twins:
            few = slice(sizes.searched)
            found["search"] = _exact(search(x[few], atoms[:ATOMS]), support[few, :2])
        record[name] = found
    return record


def _exact(indices: Tensor, support: Tensor) -> float:
    return float((indices.sort(dim=1).values == support).all(dim=1).double().mean())


def search(x: Tensor, atoms: Tensor) -> Tensor:
    """(N, 2): of all pairs of atoms of norm 1, the one whose span is nearest to x in the span of all of them.

    A pair at cosine c with products p and q takes (p^2 + q^2 - 2 c p q) / (1 - c^2) off |x|^2.
    """
    pairs = torch.tensor(list(itertools.combinations(range(len(atoms)), 2)))
    atoms = atoms.double()
    c = (atoms @ atoms.T)[pairs[:, 0], pairs[:, 1]]
    products = x.double() @ atoms.T
    p, q = products[:, pairs[:, 0]], products[:, pairs[:, 1]]
    return pairs[((p.square() + q.square() - 2 * c * p * q) / (1 - c.square())).argmax(dim=1)]


# ---- learning it ----


def trained(pull: float, seed: int, sizes: Sizes) -> list[dict[str, Any]]:
    """What each autoencoder has learnt of one dictionary; also what an untrained one would seem to have."""
    atoms = dictionary(pull, seeded(100 + TRAINED_PULLS.index(pull), seed))
    held_out = samples(atoms, sizes.samples, seeded(1, seed))
    found = []
    for name in (*MODELS, "untrained MP-SAE"):
        options = {"dead_after": 20 * sizes.batch, "generator": seeded(2, seed)}
        if name.endswith("MP-SAE"):
            sae: Autoencoder = MatchingPursuitSAE(D, M, LEVELS, **options)
        else:
            sae = TopK(D, M, LEVELS, tied=name.startswith("tied"), **options)
        if name in RATES:
            stream = seeded(3, seed)
            train(
                sae, lambda stream=stream: samples(atoms, sizes.batch, stream)[0],
                steps=sizes.steps, lr=RATES[name],
            )  # fmt: skip
        measures = learnt(sae, atoms, *held_out)
        found.append(
            {"pull": pull, "sibling_cosine": sibling_cosine(atoms), "seed": seed, "model": name, **measures}
        )
    return found


@torch.no_grad()
def learnt(sae: Autoencoder, atoms: Tensor, x: Tensor, support: Tensor) -> dict[str, float]:
    """How much of the dictionary an autoencoder knows, and how well it finds a sample's atoms by it."""
    cosines = atoms @ sae.W_dec.T
    match = matched(cosines)
    cosine = cosines.gather(1, match.unsqueeze(1))
    values, indices = sae.encode(x)[:2]
    name = torch.empty_like(match)
    name[match] = torch.arange(M)  # of learnt atoms, as true ones
    given = torch.zeros(len(x), M).scatter_(1, name[indices], (values > 0).float())
    true = torch.zeros(len(x), M).scatter_(1, support, 1.0)
    return {
        "fvu": float(fvu(sae.decode(values, indices), x)),
        "matched_cosine": float(cosine.mean()),
        "found": float((cosine > FOUND).double().mean()),
        "f1": float(2 * (given * true).sum() / (given.sum() + true.sum())),
        "exact": float((given == true).all(dim=1).double().mean()),
        "dead": int(sae.dead.sum()),
    }


def matched(cosines: Tensor) -> Tensor:
    """For each row its column, one to one: the largest entry first, then of what is left."""
    left, match = cosines.clone(), torch.empty(len(cosines), dtype=torch.int64)
    for _ in range(len(cosines)):
        row, column = divmod(int(left.argmax()), left.shape[1])
        match[row] = column
        left[row], left[:, column] = -torch.inf, -torch.inf
    return match


# ---- what came out ----

MEASURES = {
    "fvu": "FVU",
    "matched_cosine": "matched cosine",
    "found": f"atoms at cosine > {FOUND}",
    "f1": "F1 of the support",
    "exact": "exact support",
}


def table(result: dict[str, Any]) -> str:
    """Means over dictionaries, and over seeds with the least and the largest, as Markdown."""
    lines = []
    for name in ("one a level", "two of one level"):
        encoders = list(result["true_dictionary"][0][name])
        lines += [f"| {name}: mean cosine | {' | '.join(encoders)} |", "|" + "---:|" * (1 + len(encoders))]
        for cosine, records in _grouped(result["true_dictionary"]):
            means = [_mean(record[name][encoder] for record in records) for encoder in encoders]
            lines.append(f"| {cosine:.2f} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
        lines.append("")
    lines += [
        f"| mean cosine | model | {' | '.join(MEASURES.values())} |",
        "|---:|---|" + "---:|" * len(MEASURES),
    ]
    for cosine, records in _grouped(result["trained"]):
        for model in dict.fromkeys(record["model"] for record in records):
            cells = []
            for measure in MEASURES:
                values = [record[measure] for record in records if record["model"] == model]
                cells.append(f"{_mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
            lines.append(f"| {cosine:.2f} | {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(result: dict[str, Any], pyplot: Any) -> dict[str, Any]:
    figure, axes = pyplot.subplot_mosaic("AAABBB;CCDDEE", figsize=(7.5, 5.6), layout="constrained")
    titles = {"one a level": "one atom of every level", "two of one level": "two atoms of one level"}
    for place, (name, title) in zip("AB", titles.items(), strict=True):
        points = _grouped(result["true_dictionary"])
        for encoder in points[0][1][0][name]:
            label = "search over all pairs of the level" if encoder == "search" else encoder
            x = [cosine for cosine, _ in points]
            y = [_mean(record[name][encoder] for record in records) for _, records in points]
            dashes = "--" if encoder == "search" else "-"
            axes[place].plot(x, y, dashes, marker="o", markersize=3, color=COLORS[encoder], label=label)
        axes[place].set_title(f"true dictionary, {title}")
        axes[place].set_xlabel("mean cosine of two atoms of a level")
        axes[place].set_ylim(-0.03, 1.05)
        axes[place].legend(frameon=False, loc="center left" if place == "A" else "center right")
    axes["A"].set_ylabel("samples with exact support")
    shown = {"C": "fvu", "D": "found", "E": "f1"}
    for place, measure in shown.items():
        for position, (_, records) in enumerate(_grouped(result["trained"])):
            for offset, (model, color) in enumerate(MODELS.items()):
                values = [record[measure] for record in records if record["model"] == model]
                x = position + 0.24 * (offset - 1)
                axes[place].bar(x, _mean(values), 0.22, color=color, alpha=0.35, label=model)
                axes[place].plot([x] * len(values), values, "o", markersize=2.5, color=color)
        cosines = [f"{cosine:.2f}" for cosine, _ in _grouped(result["trained"])]
        axes[place].set_xticks(range(len(cosines)), cosines)
        axes[place].set_xlabel("mean cosine")
        axes[place].set_title(f"trained: {MEASURES[measure]}")
        axes[place].set_ylim(0, None if measure == "fvu" else 1.05)
    handles, labels = axes["C"].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes["C"].legend(unique.values(), unique, frameon=False, loc="upper left")
    for each in axes.values():
        each.grid(linewidth=0.3, axis="y")
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    return {"levels": figure}


def _grouped(records: list[dict[str, Any]]) -> list[tuple[float, list[dict[str, Any]]]]:
    """By pull, each with its mean cosine."""
    groups: dict[float, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["pull"], []).append(record)
    means = [(_mean(record["sibling_cosine"] for record in group), group) for group in groups.values()]
    return [(round(mean, 2) + 0.0, group) for mean, group in means]  # without -0.00


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)
