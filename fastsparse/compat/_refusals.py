"""What more than one adapter refuses."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules

from fastsparse.compat._library import RefusedError
from fastsparse.functional._tensors import autocast

# Of all scores: above that a dense product serves. On CPUs entries are faster up to 0.3 and more
# (benchmarks/bench_encoder_steps.py), but these are made dense, too; GPUs: as fastsparse.nn has it.
_MOST = {"cpu": 0.125}
_MOST_OF_GPUS = 0.01
_PROBED = 64, 256  # tokens, and latents, of which that is known beforehand: all weights would cost a pass


def refuse_unless_alike(*tensors: Tensor | None) -> None:
    """Refuse a product of tensors that haven't one dtype, nor get one by autocast."""
    given = [torch.empty(0, dtype=t.dtype, device=t.device) for t in tensors if t is not None]
    if len({t.dtype for t in autocast(*given)}) > 1:
        raise RefusedError("dtypes differ")


def refuse_unless_plain(*tensors: Any) -> None:
    """Refuse what is no tensor of PyTorch's own, and where and how our ops don't run."""
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter):
            raise RefusedError(f"a {type(tensor).__name__}, no plain tensor")
        if tensor.device.type not in ("cpu", "cuda"):
            raise RefusedError("a device that our ops don't run on")
    if forward_ad._current_level >= 0:
        raise RefusedError("forward-mode derivatives")


def refuse_unless_sparse(x: Tensor, weight: Tensor, bias: Tensor, bounds: Tensor) -> None:
    """Refuse tokens (N, D) of which a few have many scores above bounds (M,), and bounds that are none.

    Tokens and latents are taken at even distances.
    """
    if bool(bounds.isnan().any()):
        raise RefusedError("a threshold is NaN")
    tokens, latents = (
        slice(None, None, max(1, len(t) // n)) for t, n in zip((x, weight), _PROBED, strict=True)
    )
    found = F.linear(x.detach()[tokens], weight.detach()[latents], bias.detach()[latents]) > bounds[latents]
    if int(found.sum()) > _MOST.get(x.device.type, _MOST_OF_GPUS) * found.numel():
        raise RefusedError("codes are not sparse")


def refuse_hooks(looked_at: Iterable[nn.Module]) -> None:
    """Refuse modules of whose calls someone else has heard, or that have a forward of their own."""
    for module in looked_at:
        hooks = (
            module._forward_hooks, module._forward_pre_hooks,
            module._backward_hooks, module._backward_pre_hooks,
        )  # fmt: skip
        if any(hooks):
            raise RefusedError("hooks")
        if "forward" in vars(module):
            raise RefusedError("a module with a forward of its own")
    if modules._has_any_global_hook():
        raise RefusedError("hooks")
