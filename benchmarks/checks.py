"""Whether a contender's answer is right: no figure is shown without it.

Selecting k of M by fp32 scores is defined up to the rounding of the scores, which depends on the order of the
sums. So the oracle carries a tolerance for every row, and demands equal index sets wherever the scores are
further apart than it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.harness import WrongAnswer

BLOCK = 1 << 25  # elements of a temporary matrix, so that the oracle fits wherever a contender fits


@dataclass(frozen=True)
class TopKOracle:
    """The k + 1 largest scores of every row in fp32, and how far rounding can move one.

    Attributes:
        x, weight, bias: the problem.
        scores: (N, k + 1) descending; the last column is -inf where k = M.
        indices: (N, k + 1).
        tolerance: (N, 1).
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    scores: Tensor
    indices: Tensor
    tolerance: Tensor

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> "TopKOracle":
        """The plain computation in fp32, in row blocks; bf16 weights are widened by blocks of latents."""
        N, (M, D) = len(x), weight.shape
        parts = []
        for rows in x.float().split(max(1, BLOCK // M)):
            scores = rows.new_empty(len(rows), M)
            for start in range(0, M, max(1, BLOCK // D)):
                atoms = weight[start : start + max(1, BLOCK // D)].float()
                torch.mm(rows, atoms.T, out=scores[:, start : start + len(atoms)])
            if bias is not None:
                scores += bias.float()
            parts.append(scores.topk(min(k + 1, M)))
        scores, indices = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        if k == M:
            scores = torch.cat([scores, scores.new_full((N, 1), -torch.inf)], 1)
            indices = torch.cat([indices, indices.new_full((N, 1), -1)], 1)
        # Rounding of a sum of D products grows as sqrt(D), not as the worst case D, whatever the order of the
        # sum (Higham & Mary 2019, SIAM J. Sci. Comput. 41(5)); 4 covers both sides of a comparison with room.
        size = torch.linalg.vector_norm(x.float(), dim=1, keepdim=True) * largest_norm(weight)
        return cls(x, weight, bias, scores, indices, 4 * D**0.5 * 2.0**-24 * size)

    def check(self, answer: tuple[Tensor, Tensor], *, selected: float = 0.0, stored: float = 0.0) -> str:
        """Judge ``(values, indices)``, both (N, k), in any order, negative values rectified.

        Args:
            answer: what the contender returned.
            selected: relative rounding of the scores that the contender selects on, beyond that of fp32.
            stored: the same of the values that it returns.
        """
        values, indices = answer[0].float(), answer[1].long()
        k = self.scores.shape[1] - 1
        if values.shape != (len(self.scores), k) or indices.shape != values.shape:
            raise WrongAnswer(
                f"shapes must be {(len(self.scores), k)}, got {tuple(values.shape)}, {tuple(indices.shape)}"
            )
        order = indices.sort(dim=1)
        if order.values.min() < 0 or order.values.max() >= len(self.weight):
            raise WrongAnswer(f"indices must be in [0, {len(self.weight)})")
        if (order.values[:, 1:] == order.values[:, :-1]).any():
            raise WrongAnswer("a row holds one latent twice")
        largest = self.scores[:, :1].abs()
        tolerance = self.tolerance + max(selected, stored) * largest
        expected = self.scores[:, :k].relu()
        deviation = (values.sort(dim=1, descending=True).values - expected).abs()
        if not (deviation <= tolerance).all():  # also when NaN
            raise WrongAnswer(f"values differ by up to {deviation.max():.3g}")
        self._check_indices(order.values, self.tolerance + 2 * selected * largest)  # both scores are off
        self._check_pairs(values, indices, tolerance)
        return f"values within {deviation.max():.1e}, {len(values)} index sets equal where scores differ"

    def _check_indices(self, got: Tensor, tolerance: Tensor) -> None:
        """Every latent whose score is clearly above the (k + 1)-th must be there."""
        k = got.shape[1]
        cut = self.scores[:, k : k + 1]
        certain = (self.scores[:, :k] - cut > tolerance) & (self.scores[:, :k] > tolerance)
        place = torch.searchsorted(got, self.indices[:, :k].contiguous()).clamp_(max=k - 1)
        missing = certain & (got.gather(1, place) != self.indices[:, :k])
        if missing.any():
            raise WrongAnswer(
                f"{int(missing.any(dim=1).sum())} rows miss a latent that is clearly among their k largest"
            )

    def _check_pairs(self, values: Tensor, indices: Tensor, tolerance: Tensor) -> None:
        """Each value must be its latent's; the few latents that the oracle doesn't hold are scored."""
        k = indices.shape[1]
        known = self.indices[:, :k].sort(dim=1)
        place = torch.searchsorted(known.values, indices.contiguous()).clamp_(max=k - 1)
        expected = self.scores.gather(1, known.indices.gather(1, place))
        others = (known.values.gather(1, place) != indices).nonzero()
        for part in others.split(max(1, BLOCK // self.x.shape[1])):
            row, column = part.unbind(1)
            latent = indices[row, column]
            scores = (self.x[row].float() * self.weight[latent].float()).sum(dim=1)
            expected[row, column] = scores if self.bias is None else scores + self.bias[latent].float()
        if not ((values - expected.relu()).abs() <= tolerance).all():
            raise WrongAnswer("a value stands beside another latent's index")


def largest_norm(weight: Tensor) -> Tensor:
    """The largest row norm, a block of rows at a time."""
    blocks = weight.split(max(1, BLOCK // weight.shape[1]))
    return torch.stack([torch.linalg.vector_norm(block.float(), dim=1).max() for block in blocks]).max()


def close(name: str, got: Tensor, expected: Tensor, tolerance: float) -> str:
    """Raise :class:`WrongAnswer` unless |got - expected| <= tolerance * |expected| (Frobenius norms)."""
    if got.shape != expected.shape:
        raise WrongAnswer(f"{name}: shape must be {tuple(expected.shape)}, got {tuple(got.shape)}")
    distance = float(torch.linalg.vector_norm(got.float() - expected))
    relative = distance / max(float(torch.linalg.vector_norm(expected)), torch.finfo(torch.float32).tiny)
    if not relative <= tolerance:
        raise WrongAnswer(f"{name}: relative error {relative:.3g}, allowed {tolerance:.3g}")
    return f"{name} within {relative:.1e}"
