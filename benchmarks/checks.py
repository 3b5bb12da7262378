"""Whether a contender's answer is right: no figure is shown without it.

Selecting k of M by fp32 scores is defined up to the rounding of the scores, which depends on the order of the
sums. So the oracle carries a tolerance for every row, and demands equal index sets wherever the scores are
further apart than it. Matching pursuit chooses by scores in every step: the same holds for each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.harness import WrongAnswer

UNIT = 2.0**-24  # of rounding in fp32
ORTHOGONAL = 1e-4  # of |x|: what solving k normal equations in fp32 leaves of a product that should be 0
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
        return cls(x, weight, bias, scores, indices, 4 * D**0.5 * UNIT * size)

    def check(self, answer: tuple[Tensor, Tensor], *, selected: float = 0.0, stored: float = 0.0) -> str:
        """Judge ``(values, indices)``, both (N, k), in any order, negative values rectified.

        Args:
            answer: what the contender returned.
            selected: relative rounding of the scores that the contender selects on, beyond that of fp32.
            stored: the same of the values that it returns.
        """
        values, indices = answer[0].float(), answer[1].long()
        k = self.scores.shape[1] - 1
        wanted, got = (len(self.scores), k), (tuple(values.shape), tuple(indices.shape))
        if got != (wanted, wanted):
            raise WrongAnswer(f"shapes must be {wanted}, got {got[0]}, {got[1]}")
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
        if rows := int(missing.any(dim=1).sum()):
            raise WrongAnswer(f"{rows} rows miss a latent that is clearly among their k largest")

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


@dataclass(frozen=True)
class BatchTopKOracle:
    """The largest scores of a whole batch in fp32, and how far rounding can move one.

    Attributes:
        x, weight, bias, total: the problem.
        certain: the places, n M + m, that must be among the largest, ascending.
        least, most: what any of the largest must be at least, (N, 1), and the largest score.
        tolerance: (N, 1).
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    total: int
    certain: Tensor
    least: Tensor
    most: Tensor
    tolerance: Tensor

    @classmethod
    def of(
        cls, x: Tensor, weight: Tensor, bias: Tensor, total: int, *, selected: float = 0.0
    ) -> "BatchTopKOracle":
        """The plain computation in fp32, in row blocks, with the tolerance of :class:`TopKOracle`.

        Args:
            x, weight, bias, total: the problem.
            selected: relative rounding of the scores that are selected on, beyond that of fp32.
        """
        M, D = weight.shape
        step = max(1, BLOCK // M)
        scores, places = x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.int64)
        for first in range(0, len(x), step):
            block = torch.addmm(bias.float(), x[first : first + step].float(), weight.float().T).flatten()
            their = torch.arange(len(block), device=x.device) + first * M
            scores, best = torch.cat((scores, block)).topk(min(total + 1, len(scores) + len(block)))
            places = torch.cat((places, their))[best]
        size = torch.linalg.vector_norm(x.float(), dim=1, keepdim=True) * largest_norm(weight)
        tolerance = 4 * D**0.5 * UNIT * size + selected * scores[0].abs()
        cut = scores[total] if total < len(scores) else scores.new_tensor(-torch.inf)
        clear = scores[:total] > cut + 2 * tolerance.max()
        certain = places[:total][clear].sort().values
        least = scores[total - 1] - tolerance - tolerance.max()
        return cls(x, weight, bias, total, certain, least, scores[0], tolerance)

    def check(self, values: Tensor, places: Tensor, *, stored: float = 0.0) -> str:
        """Judge values and places of the largest, places ascending.

        Args:
            values, places: what the contender returned.
            stored: relative rounding of the values.
        """
        M = len(self.weight)
        if values.shape != (self.total,) or places.shape != (self.total,):
            raise WrongAnswer(f"there must be {self.total} entries, got {len(values)}, {len(places)}")
        if not (places.diff() > 0).all() or places[0] < 0 or places[-1] >= len(self.x) * M:
            raise WrongAnswer("places must ascend, and be those of tokens and latents")
        found = torch.searchsorted(places, self.certain).clamp_(max=self.total - 1)
        if missing := int((places[found] != self.certain).sum()):
            raise WrongAnswer(f"{missing} clearly among the largest are missing")
        worst = 0.0
        for value, place in zip(
            *(t.split(max(1, BLOCK // self.x.shape[1])) for t in (values, places)), strict=True
        ):
            n, m = place // M, place % M
            score = (self.x[n].float() * self.weight[m].float()).sum(dim=1) + self.bias[m].float()
            tolerance = self.tolerance[n, 0] + stored * score.abs()
            deviation = (value.float() - score.relu()).abs()
            if not (deviation <= tolerance).all():  # also when NaN
                raise WrongAnswer(f"values differ by up to {deviation.max():.3g}")
            if not (score >= self.least[n, 0]).all():
                raise WrongAnswer("one is not among the largest")
            worst = max(worst, float(deviation.max()))
        return f"values within {worst:.1e}, {len(self.certain)} of {self.total} clear of rounding, all there"

    def check_code(self, code: tuple[Tensor, Tensor, Tensor, Tensor], *, stored: float = 0.0) -> str:
        """Judge a ragged code."""
        values, indices, offsets, _ = code
        rows = torch.arange(len(self.x), device=indices.device).repeat_interleave(offsets.diff())
        return self.check(values, rows * len(self.weight) + indices, stored=stored)

    def check_dense(self, dense: Tensor, *, stored: float = 0.0) -> str:
        """Judge a code (N, M) whose entries are positive."""
        places = dense.flatten().nonzero()[:, 0]
        return self.check(dense.flatten()[places], places, stored=stored)


@dataclass(frozen=True)
class PursuitOracle:
    """Matching pursuit of unit-norm atoms in fp64, and how far rounding can move a score of an fp32 pursuit.

    Attributes:
        x, dictionary, nonnegative: the problem, of two atoms at least.
        values, indices: (N, k), the steps; residual: (N, D).
        clear: (N,), whether every best score leads the next, and 0, by more than rounding: there an fp32
            pursuit can't but take the same atoms.
        tolerance: (N,), how far a value or the norm of the residual of such a row may be off.
    """

    x: Tensor
    dictionary: Tensor
    nonnegative: bool
    values: Tensor
    indices: Tensor
    residual: Tensor
    clear: Tensor
    tolerance: Tensor

    @classmethod
    def of(cls, x: Tensor, dictionary: Tensor, k: int, *, nonnegative: bool) -> "PursuitOracle":
        values = x.new_empty(len(x), k, dtype=torch.float64)
        indices = torch.empty(len(x), k, dtype=torch.int64)
        atoms, residual = dictionary.double(), x.double()
        clear = torch.ones(len(x), dtype=torch.bool)
        off = x.new_zeros(len(x), dtype=torch.float64)  # the norm of what an fp32 residual is off by
        for t in range(k):
            scores = residual @ atoms.T
            best, place = _keys(scores, nonnegative).topk(2, dim=1)
            length = torch.linalg.vector_norm(residual, dim=1)
            error = off + rounding(x) * (length + off)
            clear &= (best[:, 0] - best[:, 1] > 2 * error) & (best[:, 0] > error)
            indices[:, t] = place[:, 0]
            value = scores.gather(1, place[:, :1])
            values[:, t] = value[:, 0].clamp_min(0) if nonnegative else value[:, 0]
            residual = residual - values[:, t : t + 1] * atoms[place[:, 0]]
            # A step projects the error and adds what the coefficient and the subtraction round.
            off = off + 2 * rounding(x) * (length + off)
        return cls(x, dictionary, nonnegative, values, indices, residual, clear, off)

    def some(self, rows: Tensor) -> "PursuitOracle":
        """Of some of the rows."""
        parts = "x", "values", "indices", "residual", "clear", "tolerance"
        return replace(self, **{name: getattr(self, name)[rows] for name in parts})

    def check(self, pursuit: tuple[Tensor, Tensor, Tensor]) -> str:
        """Judge ``(values, indices, residual)``: every step must be a greedy one, and the sums must be right.

        Each step is held against the scores, in fp64, of the residual that the steps before it left: it must
        have taken the best atom wherever that leads by more than rounding.
        """
        values, indices, residual = pursuit[0].double(), pursuit[1], pursuit[2].double()
        N, k = self.indices.shape
        self._check_shapes(values.shape == indices.shape == (N, k) and residual.shape == self.x.shape)
        if indices.min() < 0 or indices.max() >= len(self.dictionary):
            raise WrongAnswer(f"indices must be in [0, {len(self.dictionary)})")
        atoms, own, length = self.dictionary.double(), self.x.double(), self._length()
        off = torch.zeros_like(length)  # of the contender's residual from ``own``, in norm
        choices = 0
        for t in range(k):
            scores = own @ atoms.T
            score = scores.gather(1, indices[:, t : t + 1])[:, 0]
            best = _keys(scores, self.nonnegative).topk(2, dim=1).values
            error = rounding(self.x) * torch.linalg.vector_norm(own, dim=1) + off
            none = values[:, t] == 0  # allowed where there was none to take
            greedy = torch.where(none, 0, _keys(score, self.nonnegative)) >= best[:, 0] - 2 * error
            if not greedy.all():
                raise WrongAnswer(f"step {t}: {int((~greedy).sum())} rows left out a better atom")
            if not (((values[:, t] - score).abs() <= error) | none).all():  # also when NaN
                raise WrongAnswer(f"step {t}: a value is not its atom's")
            choices += int((best[:, 0] - best[:, 1] > 2 * error).sum())
            own = own - values[:, t : t + 1] * atoms[indices[:, t]]
            off = off + 4 * UNIT * length  # what a subtraction rounds, of a residual no longer than x
        deviation = torch.linalg.vector_norm(residual - own, dim=1)
        largest = float((deviation / length).max())
        if not (deviation <= off).all():
            raise WrongAnswer(f"the residual is off by up to {largest:.3g} of |x|")
        others = int((indices != self.indices).any(dim=1)[self.clear].sum())
        if others:
            raise WrongAnswer(f"{others} rows that are clear of rounding differ from fp64's")
        greedy = f"{choices} of {N * k} choices clear of rounding, all of them fp64's"
        return f"{greedy}; residual within {largest:.1e} of |x|"

    def check_codes(self, codes: Tensor) -> str:
        """Judge codes (N, M), in which repeated atoms are one: they must be fp64's on the clear rows."""
        self._check_shapes(codes.shape == (len(self.x), len(self.dictionary)))
        expected = torch.zeros(codes.shape, dtype=torch.float64).scatter_add_(1, self.indices, self.values)
        deviation = (codes.double() - expected).abs().amax(dim=1)[self.clear]
        # Every time that an atom is taken its value may be off.
        most = self.indices.shape[1] - (self.indices.sort(dim=1).values.diff(dim=1) != 0).sum(dim=1)
        if not (deviation <= (most * self.tolerance)[self.clear]).all():
            raise WrongAnswer(f"codes differ by up to {float(deviation.max()):.3g}")
        largest = float(deviation.max()) if len(deviation) else 0.0
        return f"codes within {largest:.1e} on the {len(deviation)} rows clear of rounding"

    def check_orthogonal(self, codes: Tensor) -> str:
        """Judge codes (N, M) of *orthogonal* matching pursuit, which refits all coefficients in every step.

        Its first atom is matching pursuit's, later ones need not be. What is checked is what defines it: k
        atoms, that one on the clear rows, a residual orthogonal to all of them, and on average a smaller one.
        """
        self._check_shapes(codes.shape == (len(self.x), len(self.dictionary)))
        chosen = codes != 0
        if not (chosen.sum(dim=1) == self.indices.shape[1]).all():
            raise WrongAnswer(f"every row must hold k={self.indices.shape[1]} atoms")
        first = chosen.gather(1, self.indices[:, :1])[self.clear]
        if not first.all():
            raise WrongAnswer(f"{int((~first).sum())} rows miss their first atom")
        atoms = self.dictionary.double()
        left = self.x.double() - codes.double() @ atoms
        cosine = (left @ atoms.T / self._length().unsqueeze(1)).abs().where(chosen, 0).max().item()
        if not cosine <= ORTHOGONAL:
            raise WrongAnswer(f"the residual has a product of {cosine:.3g} |x| with an atom of its own")
        energy = float(left.square().sum() / self.residual.square().sum())
        if not energy <= 1:
            raise WrongAnswer(f"{energy:.3g} times the energy that matching pursuit leaves")
        return (
            f"{energy:.2f} of the energy that matching pursuit leaves, "
            f"orthogonal to its atoms within {cosine:.1e} of |x|"
        )

    def _check_shapes(self, fine: bool) -> None:
        if not fine:
            raise WrongAnswer(f"shapes must be those of N={len(self.x)}, k={self.indices.shape[1]}")

    def _length(self) -> Tensor:
        return torch.linalg.vector_norm(self.x.double(), dim=1)


def energy_error(x: Tensor, values: Tensor, residual: Tensor) -> float:
    """The worst relative error of |x|^2 = sum of values^2 + |residual|^2, which holds for unit-norm atoms."""
    energy = x.double().square().sum(dim=1)
    parts = values.double().square().sum(dim=1) + residual.double().square().sum(dim=1)
    return float(((energy - parts).abs() / energy).max())


def rounding(x: Tensor) -> float:
    """How far an fp32 score is off at most, over |residual| |atom|: see :meth:`TopKOracle.of`."""
    return 4 * x.shape[1] ** 0.5 * UNIT


def _keys(scores: Tensor, nonnegative: bool) -> Tensor:
    return scores if nonnegative else scores.abs()


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


def close_all(expected: Mapping[str, Tensor], tolerance: float, got: Tensor | Sequence[Tensor]) -> str:
    """:func:`close` of each, in the order of what is expected."""
    got = (got,) if isinstance(got, Tensor) else got
    if len(got) != len(expected):
        raise WrongAnswer(f"{len(expected)} tensors expected, got {len(got)}")
    pairs = zip(expected.items(), got, strict=True)
    return ", ".join(close(name, one, right, tolerance) for (name, right), one in pairs)


def close_states(name: str, got: Tensor, exact: Tensor, tolerance: float) -> str:
    """Raise :class:`WrongAnswer` unless the :func:`state_errors` of states (B, T, H) are within tolerance."""
    if got.shape != exact.shape:
        raise WrongAnswer(f"{name}: shape must be {tuple(exact.shape)}, got {tuple(got.shape)}")
    worst = float(state_errors(got, exact).max()) if got.numel() else 0.0
    if not worst <= tolerance:  # also when NaN
        raise WrongAnswer(f"{name}: relative error {worst:.3g}, allowed {tolerance:.3g}")
    return f"{name} within {worst:.1e}"


def state_errors(got: Tensor, exact: Tensor) -> Tensor:
    """Of each channel of a sequence the largest error over time, beside its largest state: (B, H)."""
    largest = exact.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return (got - exact).abs().amax(dim=1) / largest
