"""The geometric median: a centre for which outliers count little."""

import torch
from torch import Tensor


def geometric_median(points: Tensor, *, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least sum of distances to all, by Weiszfeld's iteration (Tohoku Math J 43, 1937)."""
    median = points.mean(dim=0)
    for _ in range(iterations):
        distances = torch.linalg.vector_norm(points - median, dim=1)
        # A point under the current median would get infinite weight: at 1e-8 of the mean distance it stops.
        nearest = (1e-8 * distances.mean()).clamp_min(torch.finfo(points.dtype).tiny)
        weights = nearest / distances.clamp_min(nearest)
        before, median = median, (weights / weights.sum()) @ points
        if torch.linalg.vector_norm(median - before) <= tolerance * torch.linalg.vector_norm(median):
            break
    return median
