"""What the ops of gated recurrences have in common, whatever their cell: shapes, gradient and tangents.

They take ``u, *weights, *starts, cu_seqlens, solver`` and return ``*states, passes``. Ops of their gradients,
which start from inputs and states alone, take ``u, *weights, *starts, cu_seqlens, *states, *d_states``, and
whether gradients of u, of the weights and of the starts are needed. They return these, in that order; what
isn't needed is empty, of shape (0,).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastsparse._options import SOLVERS, option_at
from fastsparse.ops._library import accumulated, register, register_backward
from fastsparse.ops.linear_recurrence import First, linear_recurrence
from fastsparse.reference._gated import Cell, apart, joined
from fastsparse.reference._precision import accumulate


def register_gated(
    schema: str, *, form: str, cell: Cell, reference: Callable, backward: Callable
) -> Callable:
    """``register`` of a gated recurrence; ``backward`` runs the op of its gradient."""
    name, n = schema[: schema.index("(")], cell.states

    def solved(*arguments):
        *arguments, solver = arguments
        return reference(*arguments, option_at(name, "solver", solver, SOLVERS))

    def fake(u, *others):
        B, T, _, H = u.shape
        passes = u.new_empty(_sequences(u, others[-2]), H, dtype=torch.int32)
        return *(u.new_empty(B, T, H) for _ in range(n)), passes

    def setup_context(ctx, inputs, output) -> None:
        *kept, _ = inputs
        *states, passes = output
        ctx.mark_non_differentiable(passes)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, *states)

    def back(ctx, *gradients):
        d_states, wanted = gradients[:n], ctx.needs_input_grad[:-2]
        if d_states[0] is None and d_states[-1] is None:
            return (None,) * len(ctx.needs_input_grad)
        needs = wanted[0], any(wanted[1:-n]), any(wanted[-n:])
        found = backward(*ctx.saved_tensors, *d_states, *needs)
        return *(grad if needed else None for grad, needed in zip(found, wanted, strict=True)), None, None

    def jvp(inputs, output, tangents):
        """A linear recurrence of the derivatives of a step: in the state, and in what else enters it."""
        *inputs, cu_seqlens, _ = inputs
        inputs = [None if tensor is None else accumulate(tensor) for tensor in inputs]
        tangents = accumulated(tangents[: len(inputs)], like=inputs)
        states, starts = [accumulate(state) for state in output[:-1]], inputs[-n:]
        first = First(states[0], cu_seqlens, False)
        before = joined([first.before(*pair) for pair in zip(states, starts, strict=True)])
        given = before, *inputs[:-n]
        moved = cell.moved(*given, *tangents[:-n])
        start = _start(tangents[-n:])
        found = linear_recurrence(cell.jacobian(*given), moved, start, False, cu_seqlens)
        return *apart(cell, found.to(output[0].dtype)), None

    return register(
        schema, form=form, reference=solved, fake=fake, setup_context=setup_context, backward=back, jvp=jvp
    )


def register_gated_backward(schema: str, *, form: str, cell: Cell, reference: Callable) -> Callable:
    """``register_backward`` of the gradient of a gated recurrence."""

    def fake(u, *others):
        *tensors, needs_u, needs_weights, needs_starts = others
        *weights, cu_seqlens = tensors[: -2 * cell.states]
        weights = weights[: -cell.states]
        start = (_sequences(u, cu_seqlens), u.shape[-1]) if needs_starts else (0,)
        return (
            u.new_empty(u.shape if needs_u else (0,)),
            *(u.new_empty(weight.shape if needs_weights else (0,)) for weight in weights),
            *(u.new_empty(start) for _ in range(cell.states)),
        )

    return register_backward(schema, form=form, reference=reference, fake=fake)


def _sequences(u: Tensor, cu_seqlens: Tensor | None) -> int:
    return u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _start(parts: list[Tensor | None]) -> Tensor | None:
    """A cell's state, zeros for parts that there aren't, if there is one."""
    some = next((part for part in parts if part is not None), None)
    return (
        None if some is None else joined([torch.zeros_like(some) if part is None else part for part in parts])
    )
