"""pararnn-torch (imports as ``pararnn``): its diagonal GRU and its LSTM, by its loop and by Newton's method.

Both come out as the loop's states. ``newton_apply`` is asked for passes over all steps; three or more, which
converge to these states up to its tolerance, are served by the states themselves, and a config that asks for
something else is refused. Second derivatives are the loop's in both, where the library's own Newton takes
what its backward solves for a constant.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import compress
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastsparse import ops, reference
from fastsparse._options import SOLVERS
from fastsparse.compat._library import Library, RefusedError, Site
from fastsparse.compat._refusals import refuse_hooks
from fastsparse.functional._linear import linear, outer

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STEP = 1 << 22  # multiplications that take as long as the dozen calls of a step in the library's loop
BLOCK = 1 << 15  # numbers at a time of what is only looked at, which then stays in a cache
ITERATIONS = 3  # from which on Newton's method is taken to have converged, as the library takes it
# What of a config changes nothing of the answer, or is looked at.
SERVED = ("max_iters", "residual_atol", "residual_fail", "picard_adapt", "verify_first_step")
# What else may stand in one, as it is refused; what isn't here, by its name.
REFUSED = {
    "omega": "damping",
    "scan_backend": "a named backend",
    "jacobian": "a named Jacobian",
    "jac_structure": "a named Jacobian",
    "coords": "other coordinates",
    "chunk_len": "windows of time",
    "fused_time_loop": "windows of time",
    "recompute": "states that are computed again in backward",
}


class _Kind(NamedTuple):
    """What a cell of the library is here.

    Attributes:
        op, gradient: ours.
        definition: of the op, in plain PyTorch.
        states: how many a channel has.
        order: where the library has our gates; the other way round it is the same.
        own: what of a cell may not be its own, as its result rests on it.
    """

    op: Callable
    gradient: Callable
    definition: Callable
    states: int
    order: tuple[int, int, int]
    own: frozenset[str]


OWN = frozenset({"step", "step_with_jacobian", "_recurrence", "project_wx", "state_shape"})
GRU = _Kind(
    ops.gru_recurrence, ops.gru_recurrence_backward, reference.gru_recurrence, 1, (0, 1, 2),
    OWN | {"clipped_a"},
)  # fmt: skip
LSTM = _Kind(
    ops.lstm_recurrence, ops.lstm_recurrence_backward, reference.lstm_recurrence, 2, (0, 2, 1),
    OWN | {"clipped_recurrent", "_clip"},
)  # fmt: skip


# The sites.


def _sequential_apply(original, cell, x, h0=None, *, step=None, cu_seqlens=None):
    if step is not None:
        raise RefusedError("a step of the caller's own")
    kind = _check(cell, x, h0, cu_seqlens)
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        product = torch.get_autocast_dtype("cpu")
        if torch.promote_types(product, x.dtype) != x.dtype:
            raise RefusedError("autocast to another half precision")
    u = _gates(kind, cell, x, linear)
    states = _states(kind, cell, u, h0)
    # What backward needs is kept: the caller may write to what it gets.
    return states.clone() if kind is GRU and states.requires_grad else states


def _newton_apply(original, cell, x, config=None, *, h0=None, stats=None, cu_seqlens=None, block_table=None):
    if block_table is not None:
        raise RefusedError("a block table")
    kind = _check(cell, x, h0, cu_seqlens)
    config = _checked(config)
    if not x.shape[0]:
        raise RefusedError("an empty batch")
    with torch.autocast("cpu", enabled=False):
        u = _gates(kind, cell, x, _Product.apply)
        states = _states(kind, cell, u, h0)
        if stats is not None or config.residual_fail is not None:
            _tell(kind, cell, x, u, states, h0, config, stats)
    return states


# What they do.


class _Product(torch.autograd.Function):
    """A product that autocast leaves alone, in backward too."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx, d_u):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = d_u.flatten(0, 1)
        with torch.autocast("cpu", enabled=False):
            d_x = linear(d_u, weight.T) if needs_x else None
            d_weight = outer(rows, x.flatten(0, 1)) if needs_weight else None
        return d_x, d_weight, rows.sum(0) if needs_bias else None


class _Recurrence(torch.autograd.Function):
    """A recurrence by its op. Its second derivatives are those of its definition: the op has none."""

    @staticmethod
    def forward(ctx, kind, *inputs):
        *states, _ = kind.op(*inputs, None, SOLVERS.index("auto"))
        ctx.kind = kind
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *states)
        return tuple(states)

    @staticmethod
    def backward(ctx, *d_states):
        kind, n, saved, wanted = ctx.kind, ctx.kind.states, ctx.saved_tensors, ctx.needs_input_grad[1:]
        inputs, states = saved[:-n], saved[-n:]
        if all(grad is None for grad in d_states):
            return (None,) * (1 + len(wanted))
        if torch.is_grad_enabled():
            return None, *_differentiable(kind, inputs, d_states, wanted)
        needs = wanted[0], any(wanted[1:-n]), any(wanted[-n:])
        found = kind.gradient(*inputs, None, *states, *d_states, *needs)
        return None, *(grad if needed else None for grad, needed in zip(found, wanted, strict=True))


def _differentiable(
    kind: _Kind, inputs: Sequence[Tensor | None], d_states: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of the inputs that are wanted, as functions of inputs and d_states."""
    # Views, since an input may itself be made of another one, whose gradient is not to count that.
    inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    *states, _ = kind.definition(*inputs)
    reached = [grad is not None for grad in d_states]
    outputs, grads = (list(compress(parts, reached)) for parts in (states, d_states))
    leaves = list(compress(inputs, wanted))
    found = iter(torch.autograd.grad(outputs, leaves, grads, create_graph=True))
    return [next(found) if needed else None for needed in wanted]


def _gates(kind: _Kind, cell: nn.Module, x: Tensor, product: Callable[..., Tensor]) -> Tensor:
    """The inputs' share of our gates, in their order, (B, T, 3 H)."""
    weight, bias = cell.W_x.weight, cell.W_x.bias
    if x.shape[:2].numel() < x.shape[2]:  # the product is less than what it is of
        return _in_order(kind, product(x, weight, bias), -1)
    return product(x, _in_order(kind, weight, 0), None if bias is None else _in_order(kind, bias, 0))


def _in_order(kind: _Kind, gates: Tensor, dim: int) -> Tensor:
    """From the library's order to ours, or back."""
    if kind.order == (0, 1, 2):
        return gates
    parts = gates.chunk(3, dim)
    return torch.cat([parts[gate] for gate in kind.order], dim)


def _states(kind: _Kind, cell: nn.Module, u: Tensor, h0: Tensor | None) -> Tensor:
    """As the library has them, (B, T, H), or (c, h) (B, T, 2, H), from our gates u (B, T, 3 H)."""
    u = u.unflatten(-1, (3, cell.d_h)).to(cell.W_x.weight.dtype)
    if kind is GRU:
        weight = torch.stack(cell.clipped_a())
        return _Recurrence.apply(kind, u, weight, h0)[0]
    a_f, a_z, a_o, *peepholes = cell.clipped_recurrent()
    weight, peephole = torch.stack((a_f, a_o, a_z)), torch.stack(peepholes)
    starts = (None, None) if h0 is None else (h0[:, 1], h0[:, 0])
    h, c = _Recurrence.apply(kind, u, weight, peephole, *starts)
    return torch.stack((c, h), dim=2)


def _tell(
    kind: _Kind,
    cell: nn.Module,
    x: Tensor,
    u: Tensor,
    states: Tensor,
    h0: Tensor | None,
    config: Any,
    stats: Any,
) -> None:
    """What the library would say of the states: in ``stats``, in its log, and by its error."""
    from pararnn.solvers.newton import _fill_stats

    residual = _residual(kind, cell, u.detach(), states.detach(), h0)
    atol = config.residual_atol
    # It looks at residuals until one is small. It is told "eager", what its "auto" is on a CPU.
    iterations = 1 if atol is not None and residual < atol else config.max_iters
    _fill_stats(
        cell, x, states, h0, replace(config, scan_backend="eager"),
        iters=iterations, stats=stats, known_residual=residual,
        residual_history=() if atol is None else (residual,),
    )  # fmt: skip


@torch.no_grad()
def _residual(kind: _Kind, cell: nn.Module, u: Tensor, states: Tensor, h0: Tensor | None) -> float:
    """How far any state is from the library's own step, at most; NaN where one is."""
    start = torch.zeros_like(states[:, :1]) if h0 is None else h0.unsqueeze(1)
    found = []
    long = max(1, BLOCK // start.numel())
    for first in range(0, states.shape[1], long):
        here = states[:, first : first + long]
        before = torch.cat((start, here[:, :-1]), dim=1)
        wx = _in_order(kind, u[:, first : first + long], -1)
        found.append((cell.step(before, None, wx=wx) - here).abs().amax())
        start = here[:, -1:]
    return float(torch.stack(found).amax())


# What is refused.


def _check(cell: Any, x: Any, h0: Any, cu_seqlens: Any) -> _Kind:
    """What the cell is here, where all is such as our ops take."""
    from pararnn.cells import ParaGRU, ParaLSTM

    kind = {ParaGRU: GRU, ParaLSTM: LSTM}.get(type(cell))
    if kind is None:
        raise RefusedError("another cell")
    if kind is GRU and cell.mix != "diag":
        raise RefusedError("a recurrence that mixes channels")
    if cu_seqlens is not None:
        raise RefusedError("sequences of different lengths")
    if vars(cell).keys() & kind.own:
        raise RefusedError("a cell with a method of its own")
    product = cell.W_x
    if type(product) is not nn.Linear:
        raise RefusedError("an input product of another class")
    refuse_hooks([product])
    if torch.jit.is_tracing():
        raise RefusedError("tracing")
    if forward_ad._current_level >= 0:
        raise RefusedError("forward-mode derivatives")
    _check_tensors(kind, cell, x, h0)
    if x.numel() * 3 * cell.d_h + x.shape[1] * STEP < LIBRARY.least_work:
        raise RefusedError("little work")
    return kind


def _check_tensors(kind: _Kind, cell: nn.Module, x: Any, h0: Any) -> None:
    parameters = list(cell.parameters())
    for tensor in (x, *parameters, *(() if h0 is None else (h0,))):
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            raise RefusedError("not a plain tensor")
        if tensor.device.type != "cpu":
            raise RefusedError("a device other than the CPU")
        if tensor.dtype != x.dtype or tensor.dtype not in DTYPES:
            raise RefusedError("dtypes that differ, or such as our ops don't take")
    H = cell.d_h
    if x.dim() != 3 or cell.W_x.weight.shape != (3 * H, x.shape[-1]):
        raise RefusedError("the shape of x")
    if any(part.shape != (H,) for name, part in cell.named_parameters(recurse=False)):
        raise RefusedError("recurrent weights of another shape")
    if not x.shape[1]:
        raise RefusedError("no steps")
    slots = (2,) if kind is LSTM else ()
    if h0 is not None and h0.shape != (x.shape[0], *slots, H):
        raise RefusedError("the shape of h0")


def _checked(config: Any) -> Any:
    """A config that says how many iterations, where it asks for nothing but the states."""
    from pararnn.solvers.newton import NewtonConfig

    config = NewtonConfig() if config is None else config
    if type(config) is not NewtonConfig:
        raise RefusedError("a config of another class")
    for field in fields(config):
        if field.name not in SERVED and getattr(config, field.name) != field.default:
            raise RefusedError(REFUSED.get(field.name, f"config.{field.name}"))
    iterations = ITERATIONS if config.max_iters is None else config.max_iters
    if type(iterations) is not int or iterations < ITERATIONS:
        raise RefusedError("fewer than three iterations")
    for bound in (config.residual_atol, config.residual_fail):
        if bound is not None and not (isinstance(bound, int | float) and 0 <= bound <= inf):
            raise RefusedError("a bound on residuals that is none")
    return replace(config, max_iters=iterations)


class _Pararnn(Library):
    def _check_version(self, force: bool) -> None:
        """Also of the cells, whose equations ours stand for."""
        super()._check_version(force)
        for site in EQUATIONS:
            self._original(site, force)


EQUATIONS = tuple(
    Site(f"pararnn.cells.{module}", name, digest, lambda original: original)
    for module, name, digest in (
        ("para_gru", "ParaGRU.step", "8d83bc211b7be8dc"),
        ("para_gru", "ParaGRU._recurrence", "0cd34e513be24b75"),
        ("para_gru", "ParaGRU.clipped_a", "c3f21e9d3b952837"),
        ("para_lstm", "ParaLSTM.step", "d1f7e1b89a32b06c"),
        ("para_lstm", "ParaLSTM._recurrence", "1cbafcdb609c4648"),
        ("para_lstm", "ParaLSTM.clipped_recurrent", "ab7703607977d65b"),
        ("para_lstm", "ParaLSTM._clip", "c340862b7da152e2"),
    )
)
LIBRARY = _Pararnn(
    "pararnn",
    "pararnn-torch",
    ("0.17", "0.18"),
    (
        Site("pararnn.solvers.sequential", "sequential_apply", "c6c9b21db6264caf", _sequential_apply),
        Site("pararnn.solvers.newton", "newton_apply", "8902829d8907cd6b", _newton_apply),
    ),
)
apply, undo, status, convert = LIBRARY.apply, LIBRARY.undo, LIBRARY.status, LIBRARY.convert
