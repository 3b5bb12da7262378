"""Parameters that lie in memory as their gradients come: nobody sees it but by their strides."""

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def keep_(module: nn.Module, name: str, *, transposed: bool) -> None:
    """Keep a matrix of a module in memory by its rows, or its columns, also when a state is loaded.

    State dicts hold it contiguous, so that it can be saved.
    """
    if "_kept" not in vars(module):
        module._kept = name, transposed  # goes along with copies, as hooks do
        module.register_state_dict_post_hook(_with_contiguous)
        module.register_load_state_dict_post_hook(_lay_out)
    _lay_out(module)


@torch.no_grad()
def _lay_out(module: nn.Module, *_) -> None:
    name, transposed = module._kept
    parameter = getattr(module, name)
    parameter.data = parameter.data.T.contiguous().T if transposed else parameter.data.contiguous()


def _with_contiguous(module: nn.Module, state: dict[str, Any], prefix: str, _) -> None:
    key = prefix + module._kept[0]
    found = state.get(key)
    if isinstance(found, Tensor) and not isinstance(found, nn.Parameter):  # which is wanted itself
        state[key] = found.contiguous()
