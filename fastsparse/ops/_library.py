"""Registration of ops with PyTorch: each is one record, from which everything else about it derives.

The reference runs wherever there is no better kernel. On CUDA tensors ``fastsparse::<op>`` is Python, which
chooses among kernels (_gpu.py). Those of the compiled library are ``fastsparse_cuda::<op>``, of the same
schema.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch._guards import TracingContext
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from fastsparse._options import option_at
from fastsparse._transforms import is_batched, is_traced
from fastsparse.backend import requested, tell_libraries, wants_reference
from fastsparse.ops import _gpu
from fastsparse.ops._choice import choose
from fastsparse.ops._forms import Form
from fastsparse.reference._precision import accumulate

_LIBRARY = torch.library.Library("fastsparse", "DEF")
_CUDA_LIBRARY = torch.library.Library("fastsparse_cuda", "DEF")


# By the roofline, until a GPU has been measured. The product of topk_encode runs at the vendor library's rate
# in CUDA, at Triton's own in Triton. The sparse products move the same bytes in both, and C++ launches with
# less delay, which counts where tokens are few. So far that says the same for every op and shape.
KERNELS = ("cpu", "cuda", "triton")


@dataclass(frozen=True, eq=False)
class Op:
    """What is true of an op.

    Attributes:
        name: of ``fastsparse::<name>``, and of its modules and files everywhere.
        form: what it takes and returns (_forms.py).
        reference: its definition, of the schema's arguments, options by their names.
        kernels: the backends that have one, those for GPUs fastest first; else the reference serves.
        options: by the argument's place, its name and the names whose positions it takes (_options.py).
        check: what else must hold of the arguments; kernels on the CPU look themselves.
        differentiable: whether it has a gradient, as all have that aren't gradients themselves.
        source: the C++ file that says what it is on CPUs and GPUs, where each hasn't one of its name.
    """

    name: str
    form: Form
    reference: Callable
    kernels: tuple[str, ...] = KERNELS
    options: Mapping[int, tuple[str, Sequence[str]]] = field(default_factory=dict)
    check: Callable[..., None] | None = None
    differentiable: bool = True
    source: str | None = None

    @property
    def files(self) -> dict[str, str]:
        """By backend, the file of this project's source that runs it."""
        own = {
            "cpu": self.source or f"csrc/cpu/edge/{self.name}.cpp",
            "cuda": self.source or f"csrc/cuda/{self.name}.cu",
            "triton": f"kernels/{self.name}.py",
        }
        reference = f"{self.reference.__module__.replace('.', '/')}.py"
        return {name: own[name] for name in self.kernels} | {"reference": reference}

    def look_at(self, arguments: Sequence) -> None:
        """Raise where arguments are valid in form, but not in what they hold."""
        self.form.check_indices(self.name, arguments)
        if self.check is not None:
            self.check(*arguments)

    def refuse_batch(self) -> None:
        """Raise where all of a batch would have to return equally many entries, and none know how many."""
        raise ValueError(f"{self.name}: max_entries must be given under vmap, got None")

    def define(self, *arguments):
        """What the op is to return."""
        if (
            self.form.is_uncounted(arguments)
            and not is_traced()
            and any(is_batched(value) for value in arguments if isinstance(value, Tensor))
        ):
            self.refuse_batch()
        self.look_at(arguments)
        arguments = list(arguments)
        for place, (name, choices) in self.options.items():
            arguments[place] = option_at(self.name, name, arguments[place], choices)
        with torch.autocast(arguments[0].device.type, enabled=False):  # which would take products to halves
            return self.reference(*arguments)


OPS: dict[str, Op] = {}


def register(
    schema: str,
    form: str,
    *,
    reference: Callable,
    backward: Callable,
    jvp: Callable,
    setup_context: Callable | None = None,
    kernels: tuple[str, ...] = KERNELS,
    options: Mapping[str, Sequence[str]] | None = None,
    check: Callable[..., None] | None = None,
    differentiable: bool = True,
    source: str | None = None,
) -> Callable:
    """Define ``fastsparse::<schema>``, to which compiled libraries add kernels; returns what runs it.

    What runs it takes the schema's arguments, a tensor first, as the public functions have checked them, and
    serves the backend that was asked for. Who calls the op by its name has its tensors checked by ``form``.
    ``jvp`` takes the arguments, what came of them, and the arguments' tangents, None where there is none; it
    returns the outputs' tangents. It and ``backward`` are made of what runs ops, as they must serve the
    backend that is asked for when they run. Without ``setup_context`` all tensors that go in are kept. For
    the others see :class:`Op`.
    """
    name = schema[: schema.index("(")]
    qualified = f"fastsparse::{name}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _CUDA_LIBRARY.define(schema)
    overload = getattr(torch.ops.fastsparse, name).default
    arguments = [argument.name for argument in overload._schema.arguments]
    places = {arguments.index(argument): (argument, names) for argument, names in (options or {}).items()}
    op = OPS[name] = Op(
        name, Form(form, arguments), reference, kernels, places, check, differentiable, source
    )
    tell_libraries(name, op.form.demands)

    def fake(*arguments):
        return op.form.empty(arguments)

    _LIBRARY.impl(name, _without_kernel(op), "CompositeExplicitAutograd")
    _LIBRARY.impl(name, _gpu.implementation(op), "CUDA")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    reverse, both = _differentiated(name, overload, setup_context or _keep_tensors, backward, jvp)
    _LIBRARY.impl(name, _called_by_name(name, reverse, both), "Autograd")
    torch.library.register_vmap(qualified, _one_by_one(op, overload, fake), lib=_LIBRARY)

    def run(*arguments):
        if wants_reference(arguments[0]):
            return op.define(*arguments)
        if torch.compiler.is_compiling():
            return overload(*arguments)
        if torch._C._are_functorch_transforms_active():
            return _trust.run(overload, arguments)
        if forward_ad._current_level < 0:
            return reverse(*arguments)
        return both(*arguments)

    run.__name__ = run.__qualname__ = name
    files = "".join(f"\n    {file} ({backend})" for backend, file in op.files.items())
    run.__doc__ = f"Run ``{qualified}`` on the backend that was asked for, else the first that can.\n{files}"
    return run


def _keep_tensors(ctx, inputs, output) -> None:
    ctx.save_for_backward(*(value for value in inputs if value is None or isinstance(value, Tensor)))


def _differentiated(
    name: str, op: Callable, setup_context: Callable, backward: Callable, jvp: Callable
) -> tuple[Callable, Callable]:
    """The op with its gradient, and with its tangents too, for one level of differentiation.

    Own ones, because those of torch.library.register_autograd drop tangents, and refuse torch.func.
    """

    call = op._op  # what the overload calls, whatever it is given

    def below(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return call(*arguments)

    def forward(ctx, *arguments):
        if torch._C._are_functorch_transforms_active():
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):  # for the levels below
                output = below(*arguments)
        else:
            output = below(*arguments)
        setup_context(ctx, arguments, output)
        return output

    def forward_and_keep(ctx, *arguments):
        output = forward(ctx, *arguments)
        ctx.kept = arguments, output
        return output

    def tangents_of(ctx, *tangents):
        arguments, output = ctx.kept
        del ctx.kept  # which would keep itself alive
        if _is_traced_by_dynamo():
            raise NotImplementedError(f"{name}: {_LOST}")
        with forward_ad._set_fwd_grad_enabled(True):  # for the levels below
            return jvp(tuple(_unpacked(argument)[0] for argument in arguments), output, tangents)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(name, (_SingleLevelFunction,), methods)
    methods |= {"forward": staticmethod(forward_and_keep), "jvp": staticmethod(tangents_of)}
    dual_function = type(name, (_SingleLevelFunction,), methods)

    def reverse(*arguments):
        if not torch.is_grad_enabled() or not torch._C._any_requires_grad(*arguments):
            return below(*arguments)
        return _apply(function, arguments)

    def both(*arguments):
        if all(_unpacked(argument)[1] is None for argument in arguments):
            return reverse(*arguments)
        return _apply(dual_function, arguments)

    return reverse, both


def _apply(function: type[_SingleLevelFunction], arguments: tuple):
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*unwrap_dead_wrappers(arguments))
    with enable_single_level_autograd_function():  # torch.func has come to one level, and calls us there
        return function.apply(*arguments)


def _unpacked(argument) -> tuple:
    """An argument and its tangent."""
    return forward_ad.unpack_dual(argument, level=0) if isinstance(argument, Tensor) else (argument, None)


def accumulated(tangents: Sequence[Tensor | None], like: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Tangents in the type that sums are carried in, as are the tensors that they are of; zeros for None."""
    return [
        tensor if tensor is None else torch.zeros_like(tensor) if tangent is None else accumulate(tangent)
        for tangent, tensor in zip(tangents, like, strict=True)
    ]


def total(*terms: Tensor | None) -> Tensor | None:
    """The sum of those that there are."""
    there = [term for term in terms if term is not None]
    return sum(there[1:], start=there[0]) if there else None


def _without_kernel(op: Op) -> Callable:
    """What runs where no library has added a kernel: the reference, unless another backend was asked for."""

    def run(*arguments):
        choose(op, arguments[0].device.type, requested(), lambda name: "it has no kernel for this op")
        op.form.check(op.name, arguments)
        return op.define(*arguments)

    return run


class _Trust(threading.local):
    """Whether what calls an op by its name, in this thread, keeps the tangents of what it computes."""

    given = False

    @torch._disable_dynamo  # which would trace what runs under torch.func, frame by frame
    def run(self, op: Callable, arguments: tuple):
        before, self.given = self.given, True
        try:
            return op(*arguments)
        finally:
            self.given = before


_trust = _Trust()
_LOST = (
    "dual tensors can't go into a compiled or exported graph, nor be made inside of one, as PyTorch may drop "
    "their tangents there: take torch.func.jvp, of the function or inside of what is compiled"
)


def _called_by_name(name: str, reverse: Callable, both: Callable) -> Callable:
    """What PyTorch's dispatcher runs: where graphs call the op, and for each level of torch.func.

    Inductor's graphs drop the tangents of what they compute on the way here, and say nothing. Where
    functions are differentiated while they are traced, tangents are tensors of the graph. Those levels are
    PyTorch's own, and not counted by forward_ad.
    """
    functional = torch._C._TorchDispatchModeKey.FUNCTIONAL

    def run(*arguments):
        if torch._C._are_functorch_transforms_active() or torch._C._get_dispatch_mode(functional) is not None:
            return _trust.run(both, arguments)
        if forward_ad._current_level < 0:
            return reverse(*arguments)
        if not _trust.given and torch._C._is_fwd_grad_enabled() and not is_traced():
            raise NotImplementedError(f"{name}: {_LOST}")
        return both(*arguments)

    return run


def _one_by_one(op: Op, overload: Callable, fake: Callable) -> Callable:
    """The op under vmap: as PyTorch's own fallback, without its warning, and for an empty batch too."""

    def run(info, in_dims, *arguments):
        if op.form.is_uncounted(arguments):
            op.refuse_batch()

        def take(i: int) -> list:
            pairs = zip(arguments, in_dims, strict=True)
            return [argument if dim is None else argument.select(dim, i) for argument, dim in pairs]

        def stack(outputs: Sequence[Tensor]) -> Tensor:
            return torch.stack(outputs) if info.batch_size else outputs[0].unsqueeze(0)[:0]

        if info.batch_size == 0:
            pairs = zip(arguments, in_dims, strict=True)
            outputs = [
                fake(*(a if dim is None else a.movedim(dim, 0).sum(0).to(a.dtype) for a, dim in pairs))
            ]
        else:
            outputs = [overload(*take(i)) for i in range(info.batch_size)]
        if isinstance(outputs[0], Tensor):
            return stack(outputs), 0
        return tuple(map(stack, zip(*outputs, strict=True))), (0,) * len(outputs[0])

    return run


def _is_traced_by_dynamo() -> bool:
    """Whether torch.compile's first stage asks for shapes: dual tensors in its graph may be run as such."""
    functional = torch._C._TorchDispatchModeKey.FUNCTIONAL
    return (
        TracingContext.try_get() is not None  # torch.compiler.is_compiling() is for what is being traced
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_dispatch_mode(functional) is None
    )


def register_backward(schema: str, form: str, **record) -> Callable:
    """Define ``fastsparse::<op>_backward``, the gradient of an op, which has none itself and says so."""
    op = schema[: schema.index("_backward(")]

    def refuse(*_):
        raise NotImplementedError(
            f'{op}: second derivatives must be taken inside fastsparse.use_backend("reference"), '
            "the kernels have none"
        )

    return register(
        schema, form, setup_context=_keep_nothing, backward=refuse, jvp=refuse, differentiable=False, **record
    )


def _keep_nothing(ctx, inputs, output) -> None:
    pass
