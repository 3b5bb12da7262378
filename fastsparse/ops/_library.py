"""Registration of ops with PyTorch: schema once, the reference wherever there is no better kernel."""

from collections.abc import Callable

import torch

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
