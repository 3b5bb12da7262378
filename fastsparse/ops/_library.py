"""Registration of ops with PyTorch: schema once, the reference wherever there is no better kernel."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("fastsparse", "DEF")


def register(
    schema: str, *, reference: Callable, fake: Callable, setup_context: Callable, backward: Callable
) -> Callable:
    """Define ``fastsparse::<schema>`` and return its overload; compiled libraries add kernels to it."""
    name = schema[: schema.index("(")]
    qualified = f"fastsparse::{name}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(torch.ops.fastsparse, name).default


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Raise where PyTorch would silently drop a tangent: registered ops have no forward-mode rule."""
    if forward_ad._current_level < 0:
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            f'{op}: forward-mode differentiation must run inside fastsparse.use_backend("reference"), '
            "the kernels have none"
        )
