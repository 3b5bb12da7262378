"""The polynomial decoder's part behind the coordinates, and how the rows that make these stay orthonormal."""

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastsparse._validation import check_count
from fastsparse.functional.interactions import polynomial

_LOG = logging.getLogger(__name__)
# Cholesky's QR loses the square of a matrix's condition number in digits. A step of training leaves one of
# about 1.1; above 10 by R's diagonal, which is at most the condition number, Householder's QR takes over.
_LEAST_PIVOT = 0.1


class Polynomial(nn.Module):
    """``C_1 a + scales[0] C_2 a^2 + scales[1] C_3 a^3``: of coordinates (..., R1) vectors (..., D).

    The first R2 coordinates have squares, the first R3 cubes.

    Attributes:
        C_1: (D, R1); C_2: (D, R2); C_3: (D, R3); scales: (2,).

    Source: Koromilas et al. 2026, arXiv 2602.01322.
    """

    def __init__(self, d_model: int, ranks: Sequence[int], **factory) -> None:
        super().__init__()
        self.C_1, self.C_2, self.C_3 = (nn.Parameter(torch.empty(d_model, R, **factory)) for R in ranks)
        self.scales = nn.Parameter(torch.empty(2, **factory))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw coefficients as the source's code does, uniformly, of variance 2 / R."""
        for matrix in (self.C_1, self.C_2, self.C_3):
            bound = math.sqrt(6 / matrix.shape[1])
            matrix.uniform_(-bound, bound, generator=generator)
        self.scales.copy_(torch.tensor([-0.5, 0.5]))

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three matrices."""
        return self.C_1, self.C_2, self.C_3

    def forward(self, sums: Tensor, *, frozen: bool = False) -> Tensor:
        """Of coordinates (..., R1), (..., D); ``frozen`` gives the coefficients no gradient."""
        parts = [*self.coefficients(), self.scales]
        if frozen:
            parts = [part.detach() for part in parts]
        return polynomial(sums, parts[:3], parts[3])

    def pairs(self, first: Tensor, second: Tensor) -> Tensor:
        """What latents of coordinates (P, R1) add together, at value 1, beyond what each adds alone: (P, D).

        The mixed terms of the square and the cube of their sum.
        """
        R2, R3 = self.C_2.shape[1], self.C_3.shape[1]
        product = first[:, :R2] * second[:, :R2]
        cubes = product[:, :R3] * (first[:, :R3] + second[:, :R3])
        return 2 * self.scales[0] * product @ self.C_2.T + 3 * self.scales[1] * cubes @ self.C_3.T


def checked_ranks(name: str, ranks: Sequence[int], d_model: int, num_latents: int) -> tuple[int, int, int]:
    """R1 >= R2 >= R3, no more than there are dimensions, and latents."""
    found = tuple(check_count(name, "ranks", rank, 1) for rank in ranks)
    most = min(d_model, num_latents)
    if len(found) != 3 or list(found) != sorted(found, reverse=True) or found[0] > most:
        raise ValueError(
            f"{name}: ranks must be (R1, R2, R3) with {most} >= R1 >= R2 >= R3, "
            f"d_model and num_latents being the most, got {found}"
        )
    return found


@torch.no_grad()
def retract_(rows: Tensor, add_up: Callable[[Tensor], None], whole: Callable[[Tensor], tuple]) -> None:
    """Make the columns of a matrix orthonormal: Q of its QR decomposition with R's diagonal positive.

    By Cholesky's decomposition of the Gram matrix, products and nothing else, which processes that hold some
    rows each compute together. Where the columns have lost their rank, by Householder's instead, which the
    log says. A matrix that isn't finite stays, to surface in the loss.

    Args:
        rows: (rows here, R), in place.
        add_up: sums a tensor over the processes, in place.
        whole: of the rows here all rows, and where these are among them.

    Source: Fukaya et al. 2014, "CholeskyQR2: a simple and communication-avoiding algorithm", for the method.
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    gram = wide.T @ wide
    add_up(gram)
    R, failed = torch.linalg.cholesky_ex(gram, upper=True)
    pivots = R.diagonal()
    if bool((failed == 0) & (pivots.min() >= _LEAST_PIVOT * pivots.max())):
        rows.copy_(torch.linalg.solve_triangular(R, wide, upper=True, left=False))
    elif bool(gram.isfinite().all()):
        _LOG.warning("W_dec's columns are close to dependent: made orthonormal by Householder's QR")
        matrix, place = whole(wide)
        rows.copy_(orthonormal(matrix)[place])


def orthonormal(matrix: Tensor) -> Tensor:
    """Q of the QR decomposition whose R has a positive diagonal, by Householder's method."""
    Q, R = torch.linalg.qr(matrix)
    return Q * torch.where(R.diagonal() < 0, -1, 1)
