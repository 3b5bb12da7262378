"""Registration of ops with PyTorch: schema once, the reference wherever there is no better kernel.

On CUDA tensors ``fastsparse::<op>`` is Python, which chooses among kernels (_gpu.py). Those of the compiled
library are ``fastsparse_cuda::<op>``, of the same schema.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastsparse.backend import requested, wants_reference
from fastsparse.ops import _gpu
from fastsparse.ops._forms import FORMS, Form

_LIBRARY = torch.library.Library("fastsparse", "DEF")
_CUDA_LIBRARY = torch.library.Library("fastsparse_cuda", "DEF")


def register(
    schema: str,
    *,
    form: str,
    reference: Callable,
    fake: Callable,
    setup_context: Callable,
    backward: Callable,
) -> Callable:
    """Define ``fastsparse::<schema>``, to which compiled libraries add kernels; returns what runs it.

    What runs it takes the schema's arguments, a tensor first, as the public functions have checked them, and
    serves the backend that was asked for. Who calls the op itself has its tensors checked by ``form``.
    """
    name = schema[: schema.index("(")]
    qualified = f"fastsparse::{name}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _CUDA_LIBRARY.define(schema)
    FORMS[name] = Form(form)
    _LIBRARY.impl(name, _without_kernel(name, reference), "CompositeExplicitAutograd")
    _LIBRARY.impl(name, _gpu.implementation(name, reference), "CUDA")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    op = getattr(torch.ops.fastsparse, name).default

    def run(*arguments):
        if wants_reference(arguments[0]):
            return reference(*arguments)
        if torch.compiler.is_compiling():
            return op(*arguments)
        _refuse_forward_mode(name, arguments)  # torch.func.jvp too
        if torch._C._are_functorch_transforms_active():
            if torch.is_grad_enabled():
                _refuse_functional_gradient(name, arguments)
            return op(*arguments)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            return op(*arguments)
        # Without a gradient the registered autograd kernel, which is Python, would only cost its time.
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    return run


def _without_kernel(op: str, reference: Callable) -> Callable:
    """What runs where no library has added a kernel: the reference, unless the kernel was asked for."""

    def run(*arguments):
        if requested() == "cpu":
            raise RuntimeError(
                f"{op}: backend 'cpu' was asked for and can't run here: it has no kernel for this op"
            )
        FORMS[op].check(op, arguments)
        return reference(*arguments)

    return run


def register_backward(schema: str, *, form: str, reference: Callable, fake: Callable) -> None:
    """Define ``fastsparse::<op>_backward``, the gradient of an op, which has none itself and says so."""
    op = schema[: schema.index("_backward(")]

    def refuse(ctx, *_):
        raise NotImplementedError(
            f'{op}: second derivatives must be taken inside fastsparse.use_backend("reference"), '
            "the kernels have none"
        )

    register(schema, form=form, reference=reference, fake=fake, setup_context=_keep_nothing, backward=refuse)


def _keep_nothing(ctx, inputs, output) -> None:
    pass


def _refuse_forward_mode(op: str, arguments: tuple) -> None:
    """Raise where PyTorch would silently drop a tangent: registered ops have no forward-mode rule."""
    if forward_ad._current_level < 0:
        return
    if any(isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in arguments):
        raise NotImplementedError(
            f'{op}: forward-mode differentiation must run inside fastsparse.use_backend("reference"), '
            "the kernels have none"
        )


def _refuse_functional_gradient(op: str, arguments: tuple) -> None:
    """Raise where PyTorch would say no more than that the op's autograd.Function lacks a method."""
    functorch = torch._C._functorch
    for argument in arguments:
        if not isinstance(argument, Tensor) or not argument.is_floating_point():
            continue
        while functorch.is_functorch_wrapped_tensor(argument):
            if functorch.is_gradtrackingtensor(argument) and argument.requires_grad:
                raise NotImplementedError(
                    f"{op}: gradients by torch.func must be taken inside "
                    'fastsparse.use_backend("reference"); the kernels have those of torch.autograd'
                )
            argument = functorch.get_unwrapped(argument)
