"""The data that is measured on: seeded, so that every run sees the same.

``gaussian`` is the textbook case. ``correlated`` has what makes real residual streams hard for a screen:
factors shared by tokens and latents with a power-law spectrum, heavy-tailed token norms, and a few outlier
dimensions tens of times larger than the rest (Dettmers et al. 2022, arXiv 2208.07339; Sun et al. 2024, arXiv
2402.17762).
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import Shape

FACTORS, OUTLIERS = 64, 4
BLOCK = 1 << 22  # elements drawn by one generator: the draw does not depend on the number of threads


def normal(rows: int, columns: int, seed: int) -> Tensor:
    """(rows, columns) fp32, standard normal; torch draws with one thread, too slow for a million latents.

    In memory of PyTorch's own, as parameters are: NumPy's comes on huge pages, which changes every gather.
    """
    drawn = torch.empty(rows, columns)
    out = drawn.view(-1).numpy()
    starts = range(0, out.size, BLOCK)
    seeds = np.random.SeedSequence(seed).spawn(len(starts))

    def fill(job: tuple[int, np.random.SeedSequence]) -> None:
        start, child = job
        part = out[start : start + BLOCK]
        np.random.Generator(np.random.SFC64(child)).standard_normal(out=part, dtype=np.float32)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(fill, zip(starts, seeds, strict=True)))
    return drawn


def tokens(shape: Shape, kind: str, seed: int = 0) -> Tensor:
    """x (N, D) fp32."""
    x = normal(shape.N, shape.D, seed)
    if kind == "correlated":
        loadings = _loadings(shape)
        x = 0.3 * x + normal(shape.N, len(loadings), seed + 1) @ loadings
        x *= torch.exp(0.5 * normal(shape.N, 1, seed + 2))
        outlying = torch.linspace(1, shape.D - 2, min(OUTLIERS, shape.D)).long()
        x[:, outlying] = 30 + 10 * normal(shape.N, len(outlying), seed + 3)
    return x


def dictionary(shape: Shape, kind: str, seed: int = 10) -> Tensor:
    """Unit rows, (M, D) fp32: an encoder, or a decoder."""
    weight = normal(shape.M, shape.D, seed)
    if kind == "correlated":
        loadings = _loadings(shape)
        weight.mul_(0.3).addmm_(normal(shape.M, len(loadings), seed + 1), loadings)
    return weight.div_(torch.linalg.vector_norm(weight, dim=1, keepdim=True))


def bias(shape: Shape, seed: int = 20) -> Tensor:
    """(M,) fp32."""
    return 0.1 * normal(1, shape.M, seed)[0]


def center(shape: Shape) -> Tensor:
    """(D,) fp32: a decoder's bias."""
    return 0.1 * normal(1, shape.D, 21)[0]


def code(shape: Shape, kind: str, seed: int = 30) -> tuple[Tensor, Tensor]:
    """values, indices (N, k): latents equally popular (``gaussian``), or by Zipf's law (``correlated``)."""
    values = normal(shape.N, shape.k, seed).abs_()
    generator = np.random.default_rng(seed + 1)
    if kind == "gaussian":
        drawn = generator.integers(shape.M, size=(shape.N, shape.k))
    else:  # P(rank <= r) = log(r) / log(M); which latent has which rank is shuffled
        rank = (shape.M ** generator.random((shape.N, shape.k))).astype(np.int64) - 1
        drawn = generator.permutation(shape.M)[rank]
    return values, torch.from_numpy(drawn)


def offsets(shape: Shape, spread: float = 0.3, seed: int = 50) -> Tensor:
    """(N + 1,): of a code's N k entries, the rows that the largest scores of a batch have.

    Scores are normal, of log-normal size from token to token, as norms and how well they are explained are.
    """
    scale = torch.exp(spread * normal(shape.N, 1, seed)[:, 0].double())
    low, high = 0.0, 100.0  # where the threshold is
    for _ in range(60):
        middle = (low + high) / 2
        counts = shape.M * torch.special.ndtr(-middle / scale)
        low, high = (middle, high) if counts.mean() > shape.k else (low, middle)
    ends = counts.cumsum(0) * (shape.N * shape.k / counts.sum())
    return F.pad(ends.round().long(), (1, 0))


def _loadings(shape: Shape) -> Tensor:
    """(FACTORS, D), norms falling as 1 / sqrt(rank)."""
    strength = torch.arange(1, FACTORS + 1, dtype=torch.float32).rsqrt()
    return strength.unsqueeze(1) * normal(FACTORS, shape.D, 5) / 2
