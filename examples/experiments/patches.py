"""A dictionary of natural image patches: what it looks like, and how well each encoder uses it.

Patches of 12 x 12 grey values of two photographs, their means removed, whitened. Autoencoders are trained on
the left halves and judged on the right halves. All codes are signed, as patches have no sign of their own.

Source: Olshausen & Field 1996, "Emergence of simple-cell receptive field properties by learning a sparse code
for natural images"; the photographs are china.jpg and flower.jpg of scikit-learn.
"""

import importlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fastsparse
from examples.experiments.training import Autoencoder, TopK, best, seeded, unexplained
from fastsparse.nn import MatchingPursuitSAE, fvu

SIDE, M, K = 12, 256, 8
D = SIDE * SIDE
RATES = (3e-3, 1e-2)
FLOOR = 3e-3  # added to the variances before whitening: JPEG's noise is not worth learning
SHOWN = 128  # atoms in the picture, the most used ones
STYLES = {
    "MP-SAE": "C0",
    "TopK SAE, signed": "C1",
    "tied TopK SAE, signed": "C2",
    "TopK SAE": "C4",
    "matching pursuit": "C0",
    "OMP, scikit-learn": "C5",
    "OMP, SPAMS": "C3",
    "tied Top-k": "C2",
}


class Sizes(NamedTuple):
    steps: int
    batch: int
    held_out: int
    counts: tuple[int, ...]


FULL = Sizes(steps=1500, batch=512, held_out=1024, counts=(1, 2, 4, 8, 16, 32, 64))
QUICK = Sizes(steps=15, batch=64, held_out=64, counts=(1, 4, 16))


def run(*, quick: bool = False) -> dict[str, Any]:
    sizes = QUICK if quick else FULL
    training, held_out = photographs()
    held_out = _drawn(held_out, sizes.held_out, seeded(0))
    validation = _drawn(training, 4 * sizes.held_out, seeded(1))
    autoencoders, rates = trained(training, validation, sizes)
    pursuit = autoencoders["MP-SAE"]
    curves, left_out = encoders(pursuit.W_dec.detach(), held_out - pursuit.b_dec.detach(), sizes.counts)
    return {
        "sizes": {**sizes._asdict(), "side": SIDE, "M": M, "k": K, "training": len(training)},
        "rates": rates,
        "autoencoders": {
            name: [1 - unexplained(sae, held_out, k) for k in sizes.counts]
            for name, sae in autoencoders.items()
        },
        "encoders": curves,
        "left_out": left_out,
        "dead": {name: int(sae.dead.sum()) for name, sae in autoencoders.items()},
        "atoms": {
            name: atoms_as_text(autoencoders[name], validation) for name in ("MP-SAE", "TopK SAE, signed")
        },
    }


# ---- the data ----


def photographs() -> tuple[Tensor, Tensor]:
    """All patches (., D) of the left halves and of the right halves, whitened by the left halves.

    Raises:
        SystemExit: scikit-learn is not here.
    """
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise SystemExit(
            "patches needs scikit-learn, which brings the photographs: pip install scikit-learn"
        ) from None
    luma = np.array([0.299, 0.587, 0.114], dtype=np.float32) / 255
    images = [torch.from_numpy(image.astype(np.float32) @ luma) for image in load_sample_images().images]
    halves = [torch.cat([_patches(image.chunk(2, dim=1)[side]) for image in images]) for side in range(2)]
    variances, axes = torch.linalg.eigh((halves[0].T @ halves[0] / len(halves[0])).double())
    whiten = ((axes * (variances.clamp_min(0) + FLOOR).rsqrt()) @ axes.T).float()
    return halves[0] @ whiten, halves[1] @ whiten


def _patches(image: Tensor) -> Tensor:
    """Every patch of an image (., .), without its mean: (., D)."""
    rows = image.unfold(0, SIDE, 1).unfold(1, SIDE, 1).reshape(-1, D)
    return rows - rows.mean(dim=1, keepdim=True)


def _drawn(patches: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return patches[torch.randint(len(patches), (count,), generator=generator)]


# ---- autoencoders ----


def trained(
    training: Tensor, validation: Tensor, sizes: Sizes
) -> tuple[dict[str, Autoencoder], dict[str, float]]:
    """Each kind, and the learning rate that served it best."""
    kinds = {
        "MP-SAE": lambda **options: MatchingPursuitSAE(D, M, K, nonnegative=False, **options),
        "TopK SAE, signed": lambda **options: TopK(D, M, K, signed=True, **options),
        "tied TopK SAE, signed": lambda **options: TopK(D, M, K, tied=True, signed=True, **options),
        "TopK SAE": lambda **options: TopK(D, M, K, **options),
    }

    def batch():
        stream = seeded(3)
        return lambda: _drawn(training, sizes.batch, stream)

    autoencoders, rates = {}, {}
    for name, kind in kinds.items():

        def make(kind=kind):
            return kind(dead_after=100 * sizes.batch, generator=seeded(2))

        autoencoders[name], rates[name] = best(make, batch, validation, rates=RATES, steps=sizes.steps)
    return autoencoders, rates


@torch.no_grad()
def atoms_as_text(sae: Autoencoder, patches: Tensor) -> list[str]:
    """The most used atoms, most used first, each scaled to bytes around 128, in hexadecimal."""
    code = sae.encode(patches)
    used = torch.bincount(code.indices[code.values != 0], minlength=M)
    atoms = sae.W_dec[used.argsort(descending=True, stable=True)[:SHOWN]]
    scaled = 128 + 127 * atoms / atoms.abs().amax(dim=1, keepdim=True)
    return [row.numpy().tobytes().hex() for row in scaled.round().to(torch.uint8)]


# ---- encoders over one dictionary ----


def encoders(
    atoms: Tensor, x: Tensor, counts: tuple[int, ...]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """R^2 of each encoder at each k over the same dictionary, all signed; and why others are left out.

    Orthogonal matching pursuit fits all coefficients anew after every step; the others don't. SPAMS's also
    chooses the atom that leaves the smallest error after fitting anew (order-recursive matching pursuit),
    where scikit-learn's chooses by the residual alone, as matching pursuit does.
    """
    peers = {"OMP, scikit-learn": ("sklearn", _sklearn_omp), "OMP, SPAMS": ("spams", _spams_omp)}
    contenders = {
        "matching pursuit": lambda k: fastsparse.matching_pursuit(x, atoms, k=k, normalized=True).residual,
        "tied Top-k": lambda k: _left(x, atoms, fastsparse.topk_encode(x, atoms, k=k, activation="abs")),
    }
    left_out = {}
    for name, (package, omp) in peers.items():
        try:
            importlib.import_module(package)
        except ImportError as error:
            left_out[name] = str(error)
        else:
            contenders[name] = lambda k, omp=omp: omp(x, atoms, k)
    curves = {
        name: [1 - float(fvu(x - residual(k), x)) for k in counts] for name, residual in contenders.items()
    }
    return curves, left_out


def _left(x: Tensor, atoms: Tensor, code: fastsparse.TopK) -> Tensor:
    return x - fastsparse.sparse_decode(*code, atoms)


def _sklearn_omp(x: Tensor, atoms: Tensor, k: int) -> Tensor:
    """The residual (N, D)."""
    from sklearn.linear_model import orthogonal_mp_gram

    wide, columns = atoms.double(), x.double().T
    gram, products = (wide @ wide.T).numpy(), (wide @ columns).numpy()
    code = orthogonal_mp_gram(gram, products, n_nonzero_coefs=k)  # (M, N)
    return (columns - wide.T @ torch.from_numpy(code)).T.to(x.dtype)


def _spams_omp(x: Tensor, atoms: Tensor, k: int) -> Tensor:
    """The residual (N, D)."""
    import spams

    columns, dictionary = (np.asfortranarray(matrix.double().numpy().T) for matrix in (x, atoms))
    code = spams.omp(columns, dictionary, L=k, numThreads=1)  # sparse, (M, N)
    return torch.from_numpy((columns - dictionary @ code.toarray()).T.copy()).to(x.dtype)


# ---- what came out ----


def table(result: dict[str, Any]) -> str:
    """R^2, as Markdown."""
    counts = result["sizes"]["counts"]
    lines = []
    for title, part in (("autoencoder", "autoencoders"), ("encoder", "encoders")):
        lines += [f"| {title}: R^2 at k | {' | '.join(map(str, counts))} |", "|---|" + "---:|" * len(counts)]
        lines += [
            f"| {name} | {' | '.join(f'{value:.3f}' for value in curve)} |"
            for name, curve in result[part].items()
        ] + [""]
    lines += [f"{name} is left out: {why}" for name, why in result["left_out"].items()]
    return "\n".join(lines)


def draw(result: dict[str, Any], pyplot: Any) -> dict[str, Any]:
    curves, axes = pyplot.subplots(1, 2, figsize=(7.5, 3.2), layout="constrained", sharey=True)
    titles = {
        "autoencoders": f"autoencoders trained at k = {K}",
        "encoders": "encoders over the MP-SAE's dictionary",
    }
    counts = result["sizes"]["counts"]
    for each, (part, title) in zip(axes, titles.items(), strict=True):
        for name, curve in result[part].items():
            dashes = (0, (2, 2)) if name == "OMP, SPAMS" else "-"  # beside scikit-learn's
            each.plot(counts, curve, ls=dashes, marker="o", ms=3, color=STYLES[name], label=name)
        each.set_xscale("log")
        each.set_xticks(counts, counts)
        each.minorticks_off()
        each.set_ylim(0, 1)
        each.set_title(title)
        each.set_xlabel("latents a patch")
        each.grid(linewidth=0.3)
        each.spines[["top", "right"]].set_visible(False)
        each.legend(frameon=False)
    axes[0].set_ylabel("$R^2$ on held-out patches")
    return {"patches": curves, "patches-atoms": _picture(result["atoms"], pyplot)}


def _picture(atoms: dict[str, list[str]], pyplot: Any) -> Any:
    """Grids of atoms side by side, white lines between them."""
    figure, axes = pyplot.subplots(1, len(atoms), figsize=(7.5, 7.9), layout="constrained")
    for each, (name, rows) in zip(axes, atoms.items(), strict=True):
        columns = 8
        grid = np.full(
            ((len(rows) // columns) * (SIDE + 1) + 1, columns * (SIDE + 1) + 1), 255, dtype=np.uint8
        )
        for place, text in enumerate(rows):
            top, left = (1 + (SIDE + 1) * at for at in divmod(place, columns))
            atom = np.frombuffer(bytes.fromhex(text), dtype=np.uint8).reshape(SIDE, SIDE)
            grid[top : top + SIDE, left : left + SIDE] = atom
        each.imshow(grid, cmap="gray", vmin=0, vmax=255, interpolation="none")
        each.set_title(f"{name}: the {len(rows)} most used atoms")
        each.axis("off")
    return figure
