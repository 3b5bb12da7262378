"""What more than one adapter refuses."""

import torch
from torch import Tensor

from fastsparse.compat._library import RefusedError
from fastsparse.functional._tensors import autocast


def refuse_unless_alike(*tensors: Tensor | None) -> None:
    """Refuse a product of tensors that haven't one dtype, nor get one by autocast."""
    given = [torch.empty(0, dtype=t.dtype, device=t.device) for t in tensors if t is not None]
    if len({t.dtype for t in autocast(*given)}) > 1:
        raise RefusedError("dtypes differ")
