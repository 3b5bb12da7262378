"""What every public function does with its tensors: autocast, and leading dimensions flattened to rows."""

import torch
from torch import Tensor


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, the floating tensors in its dtype (fp64 stays, as in PyTorch's own autocast ops)."""
    if not torch._C._is_any_autocast_enabled():
        return tensors
    first = tensors[0]
    if not isinstance(first, Tensor) or first.is_meta or not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        tensor.to(dtype)
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    )


def flat(tensor: Tensor) -> Tensor:
    """(..., X) as (N, X)."""
    return tensor if tensor.dim() == 2 else tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def unflat(tensor: Tensor, like: Tensor) -> Tensor:
    """(N, X) as (..., X) with the leading dimensions of ``like``."""
    return tensor if like.dim() == 2 else tensor.reshape(*like.shape[:-1], tensor.shape[-1])
