"""Accumulation precision shared by the references."""

import torch
from torch import Tensor


def accumulate(tensor: Tensor) -> Tensor:
    """The tensor in the type that sums are carried in: fp64 stays fp64, everything else becomes fp32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
