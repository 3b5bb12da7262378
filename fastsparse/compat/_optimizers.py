"""The optimiser of a library's trainer, made faster."""

import torch
from torch import Tensor

DEVICES = ("cpu", "cuda")


def fuse_(optimizer: torch.optim.Optimizer) -> None:
    """Have the steps of an Adam done by PyTorch's fused kernel, where nobody has chosen one.

    Between its steps it is what it was, and so are its state dicts and its copies.
    """
    if type(optimizer) is torch.optim.Adam:
        optimizer.register_step_pre_hook(_fused)
        optimizer.register_step_post_hook(_as_it_was)


@torch.no_grad()
def _fused(optimizer: torch.optim.Adam, *_) -> None:
    _as_it_was(optimizer)  # where a step has raised
    optimizer._made_fused = [
        group
        for group in optimizer.param_groups
        if group["fused"] is None and not group["foreach"] and all(map(_is_dense, group["params"]))
    ]
    for group in optimizer._made_fused:
        group["fused"] = True
        for parameter in group["params"]:
            _align(parameter, optimizer.state.get(parameter, {}))


def _as_it_was(optimizer: torch.optim.Adam, *_) -> None:
    for group in vars(optimizer).pop("_made_fused", ()):
        group["fused"] = None


def _is_dense(parameter: Tensor) -> bool:
    """In an order that a copy of its size can have, too."""
    lies = parameter.is_contiguous() or (parameter.dim() == 2 and parameter.T.is_contiguous())
    return lies and parameter.is_floating_point() and parameter.device.type in DEVICES


def _align(parameter: Tensor, state: dict[str, Tensor]) -> None:
    """The kernel takes all tensors of a parameter as they lie in memory, whatever their strides."""
    if parameter.grad is not None and parameter.grad.layout is torch.strided:
        parameter.grad = _aligned(parameter.grad, parameter)
    for name, value in state.items():
        state[name] = value.to(parameter.device) if name == "step" else _aligned(value, parameter)


def _aligned(value: Tensor, parameter: Tensor) -> Tensor:
    return value if value.stride() == parameter.stride() else torch.empty_like(parameter).copy_(value)
