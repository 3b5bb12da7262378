"""What modules of polynomial activations have in common: the coefficients that they learn."""

import torch
from torch import Tensor, nn


class PolynomialActivation(nn.Module):
    """Of degree 3: ``weight`` (3,), that of the cube first, and ``bias`` (1,)."""

    weight: Tensor
    bias: Tensor

    def __init__(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All weights a third, no bias: what the paper begins with."""
        nn.init.constant_(self.weight, 1 / 3)
        nn.init.zeros_(self.bias)
