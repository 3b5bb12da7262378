"""What PyTorch may do around a call: trace it, run it without data, batch it or wrap its tensors."""

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad


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


def largest(numbers: Tensor) -> int | None:
    """Of whole numbers, all that vmap batches among them, 0 of none; None where nobody may look at them."""
    capturing = numbers.is_cuda and torch.cuda.is_current_stream_capturing()
    if is_traced() or isinstance(numbers, FakeTensor) or capturing:
        return None
    with torch._C._DisableFuncTorch():
        return max(unwrapped(numbers).reshape(-1).tolist(), default=0)


def may_branch_on(tensor: Tensor) -> bool:
    """Whether code may ask for a tensor's data: not while it is traced, nor where vmap batches it."""
    return not (is_traced() or isinstance(tensor, FakeTensor) or is_batched(tensor))


def is_batched(tensor: Tensor) -> bool:
    """Whether vmap batches a tensor."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def is_differentiated(*tensors: Tensor) -> bool:
    """Whether a derivative of what is computed from tensors may be asked for: always while it is compiled."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )


def is_traced() -> bool:
    """Whether operations go into a graph, or on tensors without data."""
    modes = torch._C._TorchDispatchModeKey
    return torch.compiler.is_compiling() or any(
        torch._C._get_dispatch_mode(mode) is not None for mode in (modes.FAKE, modes.PROXY, modes.FUNCTIONAL)
    )
