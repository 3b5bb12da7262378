"""One step of matching pursuit in Triton: method direct's first."""

from fastsparse.kernels.matching_pursuit import DTYPES as DTYPES
from fastsparse.kernels.matching_pursuit import matching_pursuit
from torch import Tensor

from fastsparse._options import METHODS


def matching_pursuit_step(
    residual: Tensor, dictionary: Tensor, nonnegative: bool = False, normalized: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """residual (N, D), dictionary (M, D); returns value (N,), index (N,), the residual after it (N, D)."""
    values, indices, after = matching_pursuit(
        residual, dictionary, 1, 0.0, nonnegative, normalized, METHODS.index("direct")
    )
    return values.view(-1), indices.view(-1), after
