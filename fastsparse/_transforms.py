"""What PyTorch may do around a call: trace it, run it without data, batch it or wrap its tensors."""

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


def unwrapped(tensor: Tensor) -> Tensor:
    """What a tensor is inside of torch.func's transforms, with what vmap batches as leading dimensions."""
    functorch, dims = torch._C._functorch, []
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_functionaltensor(tensor):
            torch._sync(tensor)
        elif functorch.is_batchedtensor(tensor):
            dims.append(functorch.maybe_get_bdim(tensor))
        tensor = functorch.get_unwrapped(tensor)
    for count, dim in enumerate(reversed(dims)):  # each counts the dimensions that are not batched below it
        tensor = tensor.movedim(count + dim, 0)
    return tensor


def may_branch_on(tensor: Tensor) -> bool:
    """Whether code may ask for a tensor's data: not while it is traced, nor where vmap batches it."""
    functorch = torch._C._functorch
    if is_traced() or isinstance(tensor, FakeTensor):
        return False
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return False
        tensor = functorch.get_unwrapped(tensor)
    return True


def is_traced() -> bool:
    """Whether operations go into a graph, or on tensors without data."""
    modes = torch._C._TorchDispatchModeKey
    return torch.compiler.is_compiling() or any(
        torch._C._get_dispatch_mode(mode) is not None for mode in (modes.FAKE, modes.PROXY, modes.FUNCTIONAL)
    )
