"""What is added up over batches of codes: how often and how much latents fire, and what is left over."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastsparse._validation import check_count, check_rows
from fastsparse.functional import BatchTopK, Pursuit, Ragged, TopK
from fastsparse.metrics._entries import entries_of
from fastsparse.nn import SparseAutoencoder


class Measures(NamedTuple):
    """What :meth:`Totals.measures` returns.

    Attributes:
        num_tokens: N.
        l0: the mean number of nonzero values a token.
        fvu: the fraction of the tokens' variance, about their mean, that reconstructions leave; None where
            none were given.
        density: (M,) float64, of how many tokens each latent has a nonzero value.
        num_dead: how many latents have none.
        effective_features: exp(entropy) of the latents' shares of all absolute values: M where all have
            equal ones, 1 where one has all, 0 where there are none.
        superposition: effective_features / D; None where no activations were given.
    """

    num_tokens: int
    l0: float
    fvu: float | None
    density: Tensor
    num_dead: int
    effective_features: float
    superposition: float | None


class Totals:
    """Sums over batches of codes, of which :meth:`measures` are made: O(M + D) memory, in float64.

    Args:
        num_latents: M.
        device: of the sums: the codes'.

    Raises:
        TypeError, ValueError: num_latents is not a positive integer.

    Example:
        >>> import torch
        >>> from fastsparse import TopK
        >>> from fastsparse.metrics import Totals
        >>> totals = Totals(num_latents=4)
        >>> totals.add_(TopK(torch.tensor([[2.0, 1.0], [2.0, 0.0]]), torch.tensor([[0, 1], [0, 3]])))
        >>> found = totals.measures()
        >>> found.l0, found.density.tolist(), found.num_dead
        (1.5, [1.0, 0.5, 0.0, 0.0], 2)

    Source: effective features are those of arXiv 2512.13568, without its 1e-10 on every share.
    """

    def __init__(self, num_latents: int, device: torch.device | str | None = None) -> None:
        self.num_latents = check_count("Totals", "num_latents", num_latents, 1)
        self.num_tokens = 0
        self.fired = torch.zeros(self.num_latents, dtype=torch.float64, device=device)
        self.mass = torch.zeros_like(self.fired)
        self.lost = 0.0  # squares that reconstructions left
        self.spread = 0.0  # squares about the mean
        self.mean: Tensor | None = None  # (D,) of the tokens whose reconstructions were given

    def add_(
        self,
        code: TopK | Ragged | BatchTopK | Pursuit,
        x: Tensor | None = None,
        reconstruction: Tensor | None = None,
    ) -> None:
        """Count a batch.

        Args:
            code: of N tokens.
            x: (N, D) or (..., D), what the code is of; with all batches, or with none.
            reconstruction: as x, what the code makes.

        Raises:
            TypeError, ValueError: code is no code, or the shapes don't fit.
            IndexError: the code holds latents that there are none of.
        """
        entries = entries_of("Totals.add_", code, self.num_latents)
        if (x is None) != (reconstruction is None):
            raise ValueError("Totals.add_: x and reconstruction must be given together, got one of them")
        if self.num_tokens and (x is None) != (self.mean is None):
            raise ValueError("Totals.add_: x must be given with every batch, or with none")
        if x is not None:
            self._compare(x, reconstruction, entries.num_tokens)
        ones = torch.ones_like(entries.values, dtype=torch.float64)
        self.fired.index_add_(0, entries.latents, ones)
        self.mass.index_add_(0, entries.latents, entries.values.double().abs())
        self.num_tokens += entries.num_tokens

    def _compare(self, x: Tensor, reconstruction: Tensor, num_tokens: int) -> None:
        D = x.shape[-1] if self.mean is None else len(self.mean)
        for name, rows in (("x", x), ("reconstruction", reconstruction)):
            check_rows("Totals.add_", name, rows, D)
            if rows.shape[:-1].numel() != num_tokens:
                raise ValueError(
                    f"Totals.add_: {name} must hold the {num_tokens} tokens of code, got shape "
                    f"{tuple(rows.shape)}"
                )
        tokens = x.detach().reshape(-1, D).double()
        left = tokens - reconstruction.detach().reshape(-1, D).double()
        if self.mean is None:
            self.mean = torch.zeros(D, dtype=torch.float64, device=tokens.device)
        if not num_tokens:
            return
        self.lost += left.square().sum().item()
        # Sums about the mean of two parts give that about the mean of both (Chan, Golub and LeVeque 1979).
        mean = tokens.mean(dim=0)
        gap, before = mean - self.mean, self.num_tokens
        total = before + num_tokens
        self.spread += (tokens - mean).square().sum().item()
        self.spread += gap.square().sum().item() * before * num_tokens / total
        self.mean += gap * num_tokens / total

    def measures(self) -> Measures:
        """What the batches so far come to.

        Raises:
            ValueError: there has been no token.
        """
        if self.num_tokens == 0:
            raise ValueError("Totals.measures: there must be at least one token, got none")
        features = effective_features(self.mass)
        fvu = None
        if self.mean is not None:
            power = self.spread + self.num_tokens * self.mean.square().sum().item()
            # As fastsparse.nn.fvu has it, tokens without variance are compared with zero; less is rounding.
            scale = self.spread if self.spread > 1e-20 * power else power
            fvu = self.lost / (scale or 1.0)
        return Measures(
            self.num_tokens,
            self.fired.sum().item() / self.num_tokens,
            fvu,
            self.fired / self.num_tokens,
            int((self.fired == 0).sum()),
            features,
            None if self.mean is None else features / len(self.mean),
        )


def evaluate(sae: SparseAutoencoder, batches: Iterable[Tensor]) -> Measures:
    """Measure an autoencoder on tokens, batch by batch.

    Args:
        sae: the autoencoder, which encodes as it does now: call ``eval()`` first if it has been trained.
        batches: (..., D) each, such as shards of activations.

    Returns:
        :class:`Measures`.

    Raises:
        ValueError: there is no token.

    Example:
        >>> import torch
        >>> from fastsparse.metrics import evaluate
        >>> from fastsparse.nn import TopKSAE
        >>> sae = TopKSAE(d_model=8, num_latents=32, k=4)
        >>> evaluate(sae, torch.randn(6, 8).split(2)).num_tokens
        6
    """
    totals = Totals(sae.num_latents, device=sae.W_dec.device)
    with torch.no_grad():
        for x in batches:
            code = sae.encode(x)
            totals.add_(code, x, sae.decode(code).reshape(x.shape))
    return totals.measures()


def effective_features(mass: Tensor) -> float:
    """Count the features that are in use: ``exp(-sum p ln p)`` of the latents' shares ``p`` of all activity.

    Args:
        mass: (M,) floating, at least 0: the sum of each latent's absolute values.

    Returns:
        Between 1 and M; 0 where there is no activity.

    Raises:
        ValueError: mass is no vector, negative or not finite.

    Example:
        >>> import torch
        >>> from fastsparse.metrics import effective_features
        >>> round(effective_features(torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])), 6)
        4.0

    Source: arXiv 2512.13568.
    """
    if mass.dim() != 1:
        raise ValueError(f"effective_features: mass must have shape (M,), got shape {tuple(mass.shape)}")
    mass = mass.detach().double()
    if not ((mass >= 0) & mass.isfinite()).all():
        raise ValueError("effective_features: mass must be finite and at least 0")
    total = mass.sum()
    if not total > 0:
        return 0.0
    return math.exp(torch.special.entr(mass / total).sum().item())


def density_histogram(density: Tensor, *, per_decade: int = 4) -> tuple[Tensor, Tensor]:
    """Count latents by how often they fire, on a logarithmic scale.

    Args:
        density: (M,) floating, in [0, 1]: of how many tokens each latent has a value.
        per_decade: bins to a factor of 10.

    Returns:
        Edges (B + 1,), ascending powers of 10 up to 1, and counts (B,) int64 of latents between them, the
        lower edge included, and 1 in the last. Latents that never fire are in no bin.

    Raises:
        TypeError, ValueError: a density is outside [0, 1], or per_decade no positive integer.

    Example:
        >>> import torch
        >>> from fastsparse.metrics import density_histogram
        >>> edges, counts = density_histogram(torch.tensor([0.0, 0.05, 0.5, 1.0]), per_decade=1)
        >>> counts.tolist()
        [1, 2]
    """
    per_decade = check_count("density_histogram", "per_decade", per_decade, 1)
    density = density.detach().double().flatten()
    if not ((density >= 0) & (density <= 1)).all():
        raise ValueError("density_histogram: density must be in [0, 1]")
    firing = density[density > 0]
    least = firing.amin().item() if len(firing) else 1.0
    count = max(1, math.ceil(-math.log10(least) * per_decade))
    edges = 10.0 ** (torch.arange(-count, 1, dtype=torch.float64, device=density.device) / per_decade)
    edges[0] = min(edges[0].item(), least)
    places = (torch.bucketize(firing, edges, right=True) - 1).clamp(0, count - 1)
    return edges, torch.bincount(places, minlength=count)
